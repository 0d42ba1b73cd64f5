"""`python -m abyssal` is `abyssal`."""

from abyssal.cli.app import app

if __name__ == "__main__":
    app(prog_name="abyssal")
