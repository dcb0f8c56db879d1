"""``python -m nndefense`` is the command ``nndefense``."""

from nndefense.cli import main

if __name__ == "__main__":
    main()
