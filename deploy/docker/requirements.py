"""What the services of one image need: the project's dependencies and those of the extras that are named.

Before the code comes into the image, so that a change of code does not install all of it again.
"""

import re
import sys
import tomllib
from pathlib import Path


def main(extras: list[str]) -> None:
    """Prints a requirement per line."""
    project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
    wanted, todo = list(project["dependencies"]), list(extras)
    while todo:
        for line in project["optional-dependencies"][todo.pop()]:
            own = re.fullmatch(r"seedrl\[(.+)\]", line)
            if own:
                todo += own[1].split(",")
            else:
                wanted.append(line)
    print("\n".join(dict.fromkeys(wanted)))


if __name__ == "__main__":
    main(sys.argv[1:])
