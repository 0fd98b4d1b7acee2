"""The command lines: options in, exit status out; every error a user can cause is one line on stderr.

`char_gru.rnn.process` runs them as programs, with what that means for streams and signals.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import io
import itertools
import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import tyro

from char_gru.rnn.config import ExportConfig, GenerateConfig, LookConfig, TrainConfig, UserError
from char_gru.rnn.process import DIVERGED, USAGE_ERROR, ended_at_once, status_after
from char_gru.rnn.terminal import complain, displayed, quoted

if TYPE_CHECKING:  # it imports NumPy, which --help does without
    from char_gru.rnn.vocabulary import Vocabulary

_WRITING = ("--length", "--temperature", "--top-k", "--top-p", "--min-p", "--num-samples", "--stop", "--seed")
"""Options that shape the texts that are written, and no score."""

_DATA_OPTIONS = ("--data", "--vocabulary-of")
"""Options that name texts, and may be given several times."""

_MAIN_OPTION = {"train.py": "--data", "generate.py": "--prompt"}
"""Program -> the option that words without one may be meant for."""

_LESS_MEMORY = {"train.py": "; lower --batch-size, --seq-length or --rnn-units", "generate.py": "; lower --num-samples"}
"""Program -> the options that decide how much memory it takes."""

_TEXT_OPTIONS = ("--prompt", "--stop", "--separator", "--temperature")
"""Options whose value may begin with a dash, or be empty."""


def train(arguments: Sequence[str] | None = None) -> int:
    """`train.py`: train a model. Exit status 0, 1 if it diverged, 2 for bad input, 128 + the number of a signal."""
    def command() -> int:
        with ended_at_once():
            from char_gru.rnn import training

        config, given = _parse(TrainConfig, arguments, prog="train.py"), _given(arguments)
        try:
            if config.resume:
                with training.folder_to_resume(config.out) as files:
                    before, checkpoint = training.resumable_run(files)
                    # tyro would turn a flag that is on into --no-...
                    defaults = replace(before, resume=False, stateful=False, bytes=False)
                    if "--epochs" in given:  # what is given now decides, not an earlier --steps
                        defaults = replace(defaults, steps=None)
                    config = replace(_parse(TrainConfig, arguments, prog="train.py", default=defaults), out=before.out,
                                     resume=True, stateful=config.stateful or before.stateful,
                                     bytes=config.bytes or before.bytes)
                    _check_bytes(config, given)
                    return training.train(config, files, checkpoint, schedule_given="--lr-schedule" in given)
            _check_bytes(config, given)
            checkpoint = None
            if config.init_from is not None:
                defaults, checkpoint = training.starting_point(config.init_from)
                config = _parse(TrainConfig, arguments, prog="train.py", default=defaults)
            return training.train(config, checkpoint=checkpoint)
        except training.Diverged as error:
            complain("train.py", f"training diverged: {error}")
            return DIVERGED

    return _reporting("train.py", command)


def generate(arguments: Sequence[str] | None = None) -> int:
    """`generate.py`: write texts, or score a text. Exit status 0, 2 for bad input, 128 + the number of a signal."""
    def command() -> int:
        config = _parse(GenerateConfig, arguments, prog="generate.py")
        _require_stdout()
        if config.score:
            if unused := [option for option in _WRITING if option in _given(arguments)]:
                raise UserError(f"--score writes no text; leave {' and '.join(unused)} out")
            return _print_scores(config)
        with ended_at_once():
            from char_gru.rnn.sampler import Generator, new_seed

        seed = new_seed() if config.seed is None else config.seed
        generator = Generator.load(config.run, config.device)
        vocabulary = generator.vocabulary
        if config.raw:
            _check_raw(vocabulary)
        rows = [prompt for prompt in _prompts(config, vocabulary.of_bytes) for _ in range(config.num_samples)]
        pieces = generator.stream(
            rows, config.length, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
            min_p=config.min_p, stop=config.stop, seed=seed, on_unknown=config.on_unknown, raw=True)
        if config.seed is None:
            print(f"--seed {seed}", file=sys.stderr)
        config = replace(config, seed=seed, stop=tuple(map(vocabulary.as_characters, config.stop)))
        prompts = list(map(vocabulary.as_learnt, rows))
        if config.format == "jsonl":
            return _print_json(prompts, pieces, config, vocabulary)
        return _print_texts(prompts, pieces, config, vocabulary)

    return _reporting("generate.py", command)


def export(arguments: Sequence[str] | None = None) -> int:
    """`rnn.export`: write a model in another format. Exit status 0, 2 for bad input."""
    def command() -> int:
        config = _parse(ExportConfig, arguments, prog="python -m rnn.export")
        with ended_at_once():
            from char_gru.rnn.export import formats

        size = formats.export(config)
        print(f"{quoted(config.out)}: {size / 1e6:.3g} MB", file=sys.stderr)
        return 0

    return _reporting("rnn.export", command)


def look(arguments: Sequence[str] | None = None) -> int:
    """`rnn.look`: what a model's units do while it reads a text. Exit status 0, 2 for bad input."""
    def command() -> int:
        config = _parse(LookConfig, arguments, prog="python -m rnn.look")
        _require_stdout()
        with ended_at_once():
            from char_gru.rnn import activations

        for line in activations.look(config):
            _write(line + "\n")
        return 0

    return _reporting("rnn.look", command)


def _parse(config_type: type, arguments: Sequence[str] | None, prog: str, **options):
    """The config that a command line gives.

    Raises: UserError, one line, for a mistake in the command line.
    """
    known = {"--help", *("--" + field.name.replace("_", "-") for field in fields(config_type)
                         if "Positional" not in field.type)}
    joined = _joined(sys.argv[1:] if arguments is None else arguments, known)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(sys.stdout or io.StringIO()):
            return tyro.cli(config_type, args=joined, prog=prog, config=(tyro.conf.FlagCreatePairsOff,), **options)
    except SystemExit as stop:
        if stop.code != USAGE_ERROR:
            raise
        box = [line.strip("│ ") for line in complaint.getvalue().splitlines() if line.startswith("│")]
        said = " ".join(itertools.takewhile(lambda line: not line.startswith("─"), box)) or complaint.getvalue()
        said = _plain(said.partition("  Got errors")[0].rstrip("."))
        raise UserError(f"{said}; {_meant(said, joined, known, prog)}see {prog} --help") from None


def _plain(said: str) -> str:
    """What tyro says of a value that is no number, in plain words."""
    for pattern, wanted in ((r"invalid literal for int\(\) with base 10: (?P<value>.*)", "a whole number"),
                            (r"no type matching .* could be instantiated from \[(?P<value>.*)\]", "a whole number"),
                            (r"could not convert string to float: (?P<value>.*)", "a number")):
        if match := re.fullmatch(r"Error parsing (?P<option>\S+): " + pattern, said):
            return f"{match['option']} is {match['value']}, but must be {wanted}"
    return said


def _joined(arguments: Sequence[str], known: set[str]) -> list[str]:
    """The arguments, each text option in one piece with its value.

    Raises: UserError for an option of `known` where a value is due, and for an empty value that is no text.
    """
    joined: list[str] = []
    for argument in arguments:
        option, last = argument.partition("=")[0], joined[-1] if joined else ""
        if last in (*_TEXT_OPTIONS, *_DATA_OPTIONS, "--prompt-file") and option in known:
            raise UserError(f"{last} has no value before {argument}; if that is its value, write {last}={argument}")
        if last in _TEXT_OPTIONS:
            joined[-1] += "=" + argument
        elif argument in ("", option + "=") and option not in _TEXT_OPTIONS:
            named = option if option in known else last if last in known else "an argument"
            raise UserError(f"{named} is empty; give it a value, or leave it out")
        else:
            joined.append(argument)
    for option in _DATA_OPTIONS:
        if joined[-1:] == [option]:
            raise UserError(f"{option} has no value; name a text")
        if [word.partition("=")[0] for word in joined].count(option) > 1:
            joined = _with_one(option, joined)
    return joined


def _with_one(option: str, arguments: Sequence[str]) -> list[str]:
    """The arguments with the texts of every time that an option is given behind one, at the end; tyro would take the
    last one's alone."""
    others, data, begun = [], [], False
    for argument in arguments:
        if begun and (argument == "-" or not argument.startswith("-")):
            data.append(argument)
            continue
        begun = argument == option
        if argument.startswith(option + "="):
            data.append(argument.partition("=")[2])
        elif not begun:
            others.append(argument)
    return [*others, option, *data]


def _meant(said: str, arguments: list[str], known: set[str], prog: str) -> str:
    """A question about what a command line with unknown arguments may mean, or an empty string."""
    strange, _, strangers = said.partition(": ")
    if not strange.startswith("Unrecognized"):
        return ""
    options = [option for option in (argument.partition("=")[0] for argument in arguments)
               if option.startswith("-") and option != "-" and option.replace("_", "-") not in known]
    if options:
        close = _closest(options[0].lstrip("-").replace("_", "-"), sorted(option[2:] for option in known))
        return f"did you mean --{close}? " if close else ""
    words = _words(strangers, arguments) if prog in _MAIN_OPTION else []
    if prog == "generate.py":
        words = [" ".join(words)] * bool(words)
    meant = f"{_MAIN_OPTION.get(prog)} {' '.join(map(shlex.quote, words))}"
    return f"did you mean {meant}? " if words else ""


def _words(listed: str, arguments: Sequence[str]) -> Sequence[str]:
    """The consecutive arguments that are listed, with commas, in a message whose lines were broken; none if they do
    not stand together."""
    listed, *words = ("".join(text.split()) + "," for text in (listed, *arguments))
    for start in range(len(words)):
        end, found = start, ""
        while listed.startswith(found) and len(found) < len(listed) and end < len(words):
            found, end = found + words[end], end + 1
        if found == listed:
            return arguments[start:end]
    return []


def _closest(word: str, names: Sequence[str]) -> str | None:
    """The name that a word may mean, by initials (`lr`), as its beginning (`rnn`), or mistyped."""
    initials = [name for name in names if "".join(part[0] for part in name.split("-")) == word]
    begun = [name for name in names if name.startswith(word)] if len(word) > 1 else []
    return next(iter(initials + begun + difflib.get_close_matches(word, names, 1)), None)


def _check_bytes(config: TrainConfig, given: set[str]) -> None:
    """Raises: UserError where options of texts stand beside --bytes, even with their usual values."""
    if config.bytes and (unused := [option for option in ("--encoding", "--newline") if option in given]):
        raise UserError(f"--bytes reads files as they are; leave {' and '.join(unused)} out")


def _given(arguments: Sequence[str] | None) -> set[str]:
    """Names of the options on a command line, with dashes."""
    words = sys.argv[1:] if arguments is None else arguments
    return {word.partition("=")[0].replace("_", "-") for word in words if word.startswith("--")}


def _end_at_once(error: RuntimeError) -> None:
    """End the process, after a failure of the GPU: nothing on it can be freed any more, and CuPy would say so for each
    of its objects. Until then the error keeps them, by its traceback."""
    if sys.stdout is not None:
        sys.stdout.flush()
    os._exit(USAGE_ERROR)


def _reporting(prog: str, command: Callable[[], int]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a character shows a question mark
    try:
        return command()
    except UserError as error:
        complain(prog, error)
    except RuntimeError as error:
        from char_gru.kernels.runtime import CompileError, DeviceError  # imports NumPy, which --help does without

        if isinstance(error, (DeviceError, CompileError)):
            complain(prog, error)
        elif type(error).__name__ in ("CUDARuntimeError", "CUDADriverError"):  # of CuPy, which a CPU does without
            atexit.register(_end_at_once, error)
            complain(prog, f"the GPU failed: {error}{_notes(error)}")
        else:
            raise
    except BrokenPipeError:  # the reader of stdout has closed it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except OSError as error:
        where = f" {error.filename}" if error.filename else ""
        complain(prog, f"cannot read or write{where}: {error.strerror or error}{_notes(error)}")
    except MemoryError as error:
        complain(prog, f"not enough memory ({error}){_LESS_MEMORY.get(prog, '')}")
    return USAGE_ERROR


def _notes(error: Exception) -> str:
    return "".join(f"; {note}" for note in getattr(error, "__notes__", ()))


def _prompts(config: GenerateConfig, as_bytes: bool) -> list[str | bytes]:
    from char_gru.rnn.texts import PROMPT_LIMIT, STDIN, read

    prompts = [read(STDIN, as_bytes, PROMPT_LIMIT) if prompt == STDIN else prompt for prompt in config.prompt]
    if config.prompt_file is not None:
        prompts.append(read(config.prompt_file, as_bytes, PROMPT_LIMIT))
    return prompts or [""]


def _check_raw(vocabulary: Vocabulary) -> None:
    """Raises: UserError where --raw has no bytes to write, or would write them to a terminal, which obeys some."""
    if not vocabulary.of_bytes:
        raise UserError("--raw is for models of bytes, and this one has learnt characters; leave it out")
    if sys.stdout.isatty():
        raise UserError("--raw writes bytes of any kind, which may reprogram a terminal; send stdout to a file or a "
                        "program, or leave --raw out")


def _print_texts(prompts: list[str], pieces: Iterator[list[str]], config: GenerateConfig,
                 vocabulary: Vocabulary) -> int:
    """Write all texts to stdout: the first text piece by piece, as it is made, the other texts at the end. Ctrl-C and
    SIGTERM end all texts where they are. Returns the exit status.

    prompts, pieces: in characters of the vocabulary. Bytes are decoded as one stream, so that a character may begin in
    a prompt and end in its text.
    """
    decode = vocabulary.text_decoder()

    def write(piece: str, last: bool = False) -> None:
        _write(vocabulary.as_bytes(piece) if config.raw else decode(piece, last))

    status, other_texts, last_piece = 0, [[prompt] for prompt in prompts[1:]], ""
    write(prompts[0])
    try:
        for first_piece, *other_pieces in pieces:
            for text, piece in zip(other_texts, other_pieces):
                text.append(piece)
            last_piece = first_piece or last_piece
            write(first_piece)  # last, since Ctrl-C most likely comes here
    except KeyboardInterrupt as stop:
        status = status_after(stop)
    ends_line = any(wanted.endswith("\n") for wanted in config.stop)
    only_lines = "\n" in config.stop and not any("\n" in prompt for prompt in prompts)
    for text in (*other_texts, None):
        if config.separator is not None or config.raw:
            write(vocabulary.as_characters(config.separator or ""))
        else:
            line_end = "" if ends_line and last_piece.endswith("\n") else "\n"
            write(line_end if only_lines or text is None else line_end + "-" * 10 + "\n")
        if text is not None:
            last_piece = "".join(text)
            write(last_piece)
    write("", last=True)
    return status


def _print_json(prompts: list[str], pieces: Iterator[list[str]], config: GenerateConfig,
                vocabulary: Vocabulary) -> int:
    """Write a line of JSON for each text, in their order, each as soon as it and those before it have ended. Ctrl-C
    and SIGTERM end all texts where they are. Returns the exit status.

    prompts, pieces: in characters of the vocabulary.
    """
    status, texts, written = 0, [""] * len(prompts), 0

    def write_line(end: str) -> None:
        _write(json.dumps({
            "prompt": vocabulary.as_text(prompts[written]), "sample": written % config.num_samples + 1,
            "text": vocabulary.as_text(texts[written]), "end": end, "seed": config.seed,
            "temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p, "min_p": config.min_p})
            + "\n")

    try:
        for pieces_of_texts in pieces:
            texts = [text + piece for text, piece in zip(texts, pieces_of_texts)]
            while written < len(texts) and (end := _end(texts[written], config)):
                write_line(end)
                written += 1
    except KeyboardInterrupt as stop:
        status = status_after(stop)
    while written < len(texts):
        write_line("interrupt")
        written += 1
    return status


def _end(text: str, config: GenerateConfig) -> str | None:
    """Why a text has ended: `stop`, `length`, or None if it has not."""
    if config.stop and text.endswith(config.stop):
        return "stop"
    return "length" if config.length and len(text) >= config.length else None


def _print_scores(config: GenerateConfig) -> int:
    """Write lines of JSON about the texts of all files; - is stdin. A file among several that has no score is told on
    stderr. Returns the exit status."""
    named = [file for files in config.score for file in files]
    for file in named:
        if os.path.isdir(file):
            raise UserError(f"--score takes files, but {file} is a folder; name a run before --score, not after it")
    with ended_at_once():
        from tqdm import tqdm

        from char_gru.rnn.sampler import Generator
        from char_gru.rnn.scoring import json_lines
        from char_gru.rnn.texts import read

    generator = Generator.load(config.run, config.device)
    vocabulary = generator.vocabulary
    files, ids_of_texts, status = [], [], 0
    for file in named:
        try:
            text = read(file, vocabulary.of_bytes)
            try:
                ids_of_texts.append(generator.ids_to_score(text, config.on_unknown))
            except UserError as error:
                raise UserError(f"{file}: {error}") from None
            files.append(file)
        except UserError as error:
            complain("generate.py", error)
            status = USAGE_ERROR
    if not files:
        return status
    with tqdm(total=sum(len(ids) - 1 for ids in ids_of_texts), unit=f" {vocabulary.unit}s", unit_scale=True,
              disable=None, dynamic_ncols=True, leave=False) as bar:
        parts = generator.score_parts(ids_of_texts, config.exact, config.per_character, bar.update)
        for lines in json_lines(parts, vocabulary, files if len(named) > 1 else None):
            with bar.external_write_mode():
                _write(lines)
    return status


def _require_stdout() -> None:
    """Raises: UserError where stdout is closed."""
    if sys.stdout is None:
        raise UserError("stdout is closed, and what is written there would be lost; send it to a file or a program")


def _write(text: str | bytes) -> None:
    """Raises: BrokenPipeError where nobody reads stdout any more; another OSError that names stdout."""
    try:
        if isinstance(text, bytes):
            sys.stdout.buffer.write(text)
        else:
            sys.stdout.write(displayed(text))
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "stdout") from None
