"""`python -m dflow` is the command `dflow`."""

from dflow.cli.main import run

if __name__ == "__main__":
    run()
