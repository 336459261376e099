"""``python -m async_pipeline``: the same as the command ``async-pipeline``."""

from .cli import main

if __name__ == "__main__":
    main()
