import subprocess
import sys


def test_replay_needs_no_torch_as_it_never_looks_into_what_it_stores() -> None:
    code = "import sys; sys.modules['torch'] = None; import services.replay.service, services.replay.config"
    subprocess.run([sys.executable, "-c", code], check=True)
