from services.inference.status import Rate


def test_a_rate_is_the_growth_per_second_over_the_last_ten() -> None:
    rate = Rate()
    assert rate.per_second == 0.0
    rate.add(100.0, 50)
    assert rate.per_second == 0.0
    rate.add(102.0, 250)
    assert rate.per_second == 100.0
    for second in range(3, 40):
        rate.add(100.0 + second, 250)
    assert rate.per_second == 0.0
