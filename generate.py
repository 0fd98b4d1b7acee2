"""Write text with a trained model: `python generate.py --help`."""

from rnn.commands import generate

if __name__ == "__main__":
    raise SystemExit(generate())
