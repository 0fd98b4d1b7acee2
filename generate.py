"""Write text with a trained model: `python generate.py --help`."""

if __name__ == "__main__":
    try:
        from char_gru.rnn.process import generate

        status = generate()
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)
