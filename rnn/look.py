"""See what the units of a model do while it reads a text: `python -m rnn.look --help`."""

if __name__ == "__main__":
    try:
        from char_gru.rnn.process import look

        status = look()
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)
