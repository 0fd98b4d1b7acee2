"""Write a model in another format, or another framework's model as a checkpoint: `python -m rnn.export --help`."""

if __name__ == "__main__":
    try:
        from char_gru.rnn.process import export

        status = export()
    except KeyboardInterrupt:
        status = 130
    raise SystemExit(status)
