"""``python -m gimbal``: the command, where its script is not on the path."""

from gimbal.cli import main

if __name__ == "__main__":
    main()
