"""Train a character-level GRU on text: `python train.py --help`."""

if __name__ == "__main__":
    try:
        from char_gru.rnn.process import train

        status = train()
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)
