"""What a network raises, in words."""


def error_words(error: BaseException) -> str:
    """Kind and text of `error` in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())
