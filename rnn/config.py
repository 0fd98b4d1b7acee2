"""Options of training and generation, the sizes of a model, and the one error that users see.

The dataclasses are the command lines: names, types, defaults and help texts of ``train.py``, ``generate.py``,
``rnn.export`` and ``rnn.look`` come from here and nowhere else.
"""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, get_args, get_origin, get_type_hints

import tyro


def _told(metavar: str | None = None):
    """How `--help` shows an option whose default its help text tells."""
    return tyro.conf.arg(metavar=metavar, help_behavior_hint="")


class UserError(Exception):
    """Input that cannot be used. The message is one line: what is wrong, where, and what to do about it."""


@dataclass(frozen=True)
class Sizes:
    """Sizes that fix every parameter's shape.

    V: vocabulary size with `[UNK]`; E: embedding dimension; H: units of each GRU layer; layers: GRU layers.
    Raises: ValueError for sizes that are no whole numbers of at least 1.
    """

    V: int
    E: int
    H: int
    layers: int = 1

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if isinstance(value, bool) or not _is_integer(value) or value < 1:
                raise ValueError(f"{name}: expected a whole number of at least 1, got {value!r:.50}")
            object.__setattr__(self, name, int(value))  # NumPy's integers are none of JSON's


def _require(condition: bool, option: str, value: object, wanted: str) -> None:
    if not condition:
        raise UserError(f"{option} is {value}, but must be {wanted}")


def has_type(value: object, hint: object) -> bool:
    """Whether a value that was read from JSON is of an option's type; a whole number is a float, too."""
    arguments = get_args(hint)
    if get_origin(hint) is Literal:
        return value in arguments
    if get_origin(hint) is tuple:
        return type(value) is tuple and all(has_type(item, arguments[0]) for item in value)
    if arguments:
        return any(has_type(value, argument) for argument in arguments)
    return type(value) is hint or (hint is float and type(value) is int and abs(value) < 2**53)


class Stage(NamedTuple):
    """Consecutive epochs with sequences of one length; epochs: their number, None for all that are left."""

    length: int
    epochs: int | None = None


@dataclass(frozen=True)
class TrainConfig:
    """Train a character-level GRU language model on text and keep everything about the run in one folder.

    Text is UTF-8, unless --encoding or --bytes is given. Progress goes to stderr, samples of generated text go to
    stdout.
    """

    data: Annotated[tuple[str, ...], _told("TEXT...")] = ()
    """what to learn: shakespeare, python-docs, or any of files, folders, patterns in quotes ('texts/*.txt') and - for
    stdin, read one after the other; .gz is unpacked; runs and checkpoints in folders are left out (default:
    shakespeare)"""
    out: Annotated[Path | None, _told("FOLDER")] = None
    """folder of the run (default: a new one under runs/)"""
    epochs: int = 10
    """passes over the training text; with --steps, they do not count"""
    steps: Annotated[int | None, _told("INT")] = None
    """stop after this many training steps in all, be it inside an epoch, whatever --epochs is"""
    batch_size: int = 64
    """sequences in a batch"""
    seq_length: Annotated[int | str, tyro.conf.arg(metavar="INT|INT:EPOCHS,...,INT")] = 100
    """characters that a sequence predicts; or first one length for so many epochs, then others: 50:10,200:20,400 has
    sequences of 50 for 10 epochs, of 200 for 20, and of 400 for all that are left"""
    embedding_dim: int = 256
    """numbers that stand for a character"""
    rnn_units: int = 1024
    """hidden units of each GRU layer"""
    layers: int = 1
    """GRU layers"""
    dropout: float = 0.0
    """share of every GRU layer's outputs that is dropped in training"""
    init: Literal["keras", "pytorch"] = "pytorch"
    """initial values: as Keras chooses them (the tutorial's) or as PyTorch does"""
    init_from: Annotated[str | None, _told("RUN_OR_CHECKPOINT")] = None
    """start from the weights of this checkpoint or run: sizes come from it, characters that it does not know get new
    rows, everything else is free"""
    learning_rate: float = 1e-3
    """Adam's learning rate (its peak, with a schedule)"""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    """learning rate after the warm-up: constant, or falling along a cosine to a tenth at the run's end; given to a
    resumed run that has another schedule, rate, warm-up or end than before, it begins anew, with its warm-up"""
    warmup_steps: int = 0
    """steps over which the learning rate rises linearly from 0"""
    clip_norm: float = 0.0
    """largest global norm of the gradient; 0 does not clip"""
    val_fraction: float = 0.05
    """share of the text, from its end, kept for validation"""
    stateful: bool = False
    """read the text as contiguous streams and carry the state from batch to batch"""
    patience: int = 0
    """stop after this many epochs without a lower validation loss; 0 never does"""
    eval_every: int = 0
    """also evaluate, write a sample and draw the losses after every so many steps; 0 does so after every epoch, and in
    epochs of more than 5,000 steps after equal parts of them"""
    save_every: int = 0
    """also keep a numbered checkpoint every so many epochs; 0 keeps none"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to compute; auto takes an NVIDIA GPU if there is one"""
    precision: Literal["auto", "fp32", "tf32", "bf16"] = "auto"
    """arithmetic of matrix products; the CPU has fp32 only"""
    no_graph: bool = False
    """launch every kernel of a step on its own, for debugging; a GPU otherwise replays a step as one CUDA graph, with
    the same results"""
    seed: int = 0
    """seed of initial values, order of sequences, dropout and samples"""
    tensorboard: bool = False
    """also write losses and learning rates as events for TensorBoard, in the run's folder"""
    bytes: bool = False
    """learn the bytes of files of any kind, as they are, instead of the characters of texts"""
    encoding: str = "utf-8"
    """encoding of the files; utf-8 also reads UTF-16 that begins with its byte order mark"""
    newline: Literal["unix", "keep"] = "unix"
    """line ends of the files: made one newline character each, or kept as they are"""
    separator: str = ""
    """text between two files; $'\\n' is a line end in bash and zsh"""
    resume: bool = False
    """continue the run in --out (default: the newest under runs/) exactly where it stopped, with its options; its text
    may lie elsewhere now (--data)"""

    def __post_init__(self) -> None:
        _ = self.stages  # which refuses what is no --seq-length
        for option in ("epochs", "batch_size", "embedding_dim", "rnn_units", "layers"):
            value = getattr(self, option)
            _require(value >= 1, _flag(option), value, "at least 1")
        for option in ("warmup_steps", "patience", "eval_every", "save_every", "seed"):
            value = getattr(self, option)
            _require(value >= 0, _flag(option), value, "at least 0")
        _require(self.seed < 2**63, "--seed", self.seed, "below 2^63")
        _require(self.steps is None or self.steps >= 1, "--steps", self.steps, "at least 1")
        _require(0 <= self.dropout < 1, "--dropout", self.dropout, "in [0, 1)")
        _require(0 < self.learning_rate < math.inf, "--learning-rate", self.learning_rate, "a finite number above 0")
        _require(0 <= self.clip_norm < math.inf, "--clip-norm", self.clip_norm, "a finite number of at least 0")
        _require(0 <= self.val_fraction <= 0.5, "--val-fraction", self.val_fraction, "in [0, 0.5]")
        _require(self.separator == self.separator.encode(errors="ignore").decode(), "--separator",
                 ascii(self.separator), "UTF-8")
        if self.patience and not self.val_fraction:
            raise UserError("--patience watches the validation loss; give --val-fraction above 0 as well")

    @property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of --seq-length. Raises: UserError."""
        value = str(self.seq_length)
        _require(re.fullmatch(r"(N:N,)*N(:N)?".replace("N", "[1-9][0-9]{0,999}"), value) is not None, "--seq-length",
                 value, "a whole number of at least 1, or lengths with their epochs and a last one without, as "
                 "50:10,200:20,400")
        *pairs, last = (tuple(map(int, part.split(":"))) for part in value.split(","))
        if len(last) == 2:
            raise UserError(f"--seq-length is {value}, but the last length takes all epochs that are left; give it "
                            "without a number of epochs")
        return (*(Stage(*pair) for pair in pairs), Stage(*last))

    def saved(self) -> dict:
        """The options that belong to a run, as JSON values: all options but its folder, whether it was resumed, whether
        it writes events, and how a GPU launches its steps."""
        options = asdict(self)
        del options["out"], options["resume"], options["tensorboard"], options["no_graph"]
        return options | {"data": list(self.data)}

    @staticmethod
    def from_saved(options: dict, **unsaved: object) -> TrainConfig:
        """The inverse of `saved`; `unsaved` gives the options that `saved` leaves out.

        Raises: AttributeError, KeyError or TypeError for what `saved` never returns; UserError for values out of range.
        """
        hints = get_type_hints(TrainConfig)
        known = {name: value for name, value in options.items() if name in hints} | {"data": tuple(options["data"])}
        known.setdefault("newline", "keep")  # of runs from before there was this option
        for name, value in known.items():
            if not has_type(value, hints[name]):
                raise TypeError(f"--{name.replace('_', '-')}")
        return TrainConfig(**known | unsaved)


CHANGEABLE_ON_RESUME = frozenset({
    "data", "encoding", "newline", "separator", "epochs", "steps", "dropout", "learning_rate", "lr_schedule",
    "warmup_steps", "clip_norm", "patience", "eval_every", "save_every", "device", "precision",
})
"""Options that a resumed run may change, as long as its text stays the same; every other option fixes the parameters or
the order of the text."""


@dataclass(frozen=True)
class GenerateConfig:
    """Write text with a trained model, character by character.

    Text goes to stdout as it is made, everything else to stderr.
    """

    run: Annotated[tyro.conf.Positional[Path | None], _told("[RUN_OR_CHECKPOINT]")] = None
    """folder of a run or a .safetensors file (default: the newest run under runs/)"""
    prompt: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """text to continue; - reads it from stdin; give it several times for several texts"""
    prompt_file: Annotated[Path | None, _told("FILE")] = None
    """file with a text to continue"""
    length: int = 1000
    """characters (of a model of bytes: bytes) to write after each prompt; 0 writes until Ctrl-C"""
    temperature: float = 1.0
    """below 1 safer, above 1 wilder; 0 always takes the most likely character"""
    top_k: int = 0
    """choose among the k most likely characters only; 0 among all"""
    top_p: float = 1.0
    """choose among the most likely characters that together have at least this probability"""
    min_p: float = 0.0
    """choose among characters whose probability is at least this share of the largest one"""
    num_samples: int = 1
    """texts for each prompt"""
    stop: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """end a text once it contains this; give the option several times for several such strings"""
    seed: Annotated[int | None, _told("INT")] = None
    """the same seed writes the same text (default: a new one, told on stderr)"""
    on_unknown: Literal["error", "skip", "unk"] = "error"
    """what to do with characters of a text that the model does not know"""
    format: Literal["text", "jsonl"] = "text"
    """how texts are written: as they are, prompts included; or as a line of JSON each (prompt, sample, text, end, seed
    and what shaped the drawing), in their order, as soon as each has ended"""
    separator: Annotated[str | None, _told("TEXT")] = None
    """what to write after each text; $'\\n' is a line end in bash and zsh (default: a line of dashes between two texts,
    or, where each text is one line, its line end alone)"""
    raw: bool = False
    """write the bytes of a model of bytes as they are, instead of the text that they are in UTF-8"""
    score: Annotated[tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]], tyro.conf.arg(metavar="FILE...")] = ()
    """write no text; print how likely the model finds the text of each file (- is stdin), as a line of JSON on stdout:
    the mean loss in nats per character, the same in bits, and the number of characters scored, which are all but the
    first; for a text that was cut into rows, also their number, how many characters each reads before those it scores,
    and an estimate of how far this moves the loss"""
    per_character: bool = False
    """with --score, print a line of JSON for each character scored before that of its text: its log-probability, its
    rank and the five likeliest characters with theirs"""
    exact: bool = False
    """with --score, read each text as one row from its start, which is many times slower for a long one"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to compute; auto takes an NVIDIA GPU if there is one"""

    def __post_init__(self) -> None:
        check_length(self.length)
        _require(1 <= self.num_samples < 2**16, "--num-samples", self.num_samples, "from 1 to 65,535")
        if self.seed is not None:
            check_seed(self.seed, 63)
        check_sampling(self.temperature, self.top_k, self.top_p, self.min_p)
        if "" in self.stop:
            raise UserError("--stop is empty; give the text at which to stop, or leave the option out")
        if self.score and (self.prompt or self.prompt_file is not None):
            raise UserError("--score writes no text; leave --prompt and --prompt-file out")
        if () in self.score:
            raise UserError("--score names no file; give one or several, or - for stdin")
        if not self.score and (self.per_character or self.exact):
            raise UserError("--per-character and --exact are for --score; give --score FILE as well")
        if self.raw and (self.score or self.format == "jsonl"):
            raise UserError("--raw is for texts; leave it out with --score and with --format jsonl")
        if self.separator is not None and (self.score or self.format == "jsonl"):
            raise UserError("--separator stands after texts; leave it out with --score and with --format jsonl")


@dataclass(frozen=True)
class ExportConfig:
    """Write a model for other software, or another framework's model as a checkpoint.

    The suffix of the file to write tells its format: .onnx (the generator, for any runtime of ONNX), .html (a page that
    writes text and shows the model's inside), .keras and .weights.h5 (Keras), .safetensors (a checkpoint, which also
    loads into PyTorch).
    """

    source: Annotated[tyro.conf.Positional[Path], _told("RUN_OR_MODEL")]
    """folder of a run, a checkpoint, a Keras model (.keras, .weights.h5), or the tensors of a PyTorch model
    (.safetensors)"""
    out: Annotated[tyro.conf.Positional[Path], _told("OUT")]
    """file to write"""
    force: bool = False
    """replace the file if it exists"""
    logits: bool = False
    """.onnx: the network alone, ids of characters in, logits out, instead of the generator that draws characters"""
    weights: Literal["fp32", "fp16", "int8"] = "fp16"
    """.html: how the page holds its matrices"""
    vocabulary_of: Annotated[tuple[str, ...], _told("TEXT...")] = ()
    """texts, named as for --data of train.py, for a model of another framework that has no vocabulary in its file: id 0
    is [UNK], ids from 1 on are the sorted characters of the texts"""


@dataclass(frozen=True)
class LookConfig:
    """Read a text with a model of characters, show which units follow it, and with --save write what all units do.

    A table on stdout tells which hidden units follow the position in a line, case, quotes, brackets, and spaces.
    """

    run: Annotated[tyro.conf.Positional[Path], _told("RUN_OR_CHECKPOINT")]
    """folder of a run or a .safetensors file"""
    text: Annotated[tyro.conf.Positional[str], _told("TEXT")]
    """file with the text, or - for stdin"""
    save: Annotated[Path | None, _told("FILE")] = None
    """.safetensors file for ids, states, gates, logits and surprisal of every character"""
    dtype: Literal["float16", "float32"] = "float16"
    """type of the states, gates and logits in that file"""
    units: int = 5
    """units that the table shows for each property of the text"""
    on_unknown: Literal["error", "skip", "unk"] = "error"
    """what to do with characters of the text that the model does not know"""
    force: bool = False
    """replace the file if it exists"""
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """where to compute; auto takes an NVIDIA GPU if there is one"""

    def __post_init__(self) -> None:
        _require(self.units >= 1, "--units", self.units, "at least 1")


def check_length(length: int) -> None:
    """Check the number of characters to write, 0 for no end.

    Raises: UserError.
    """
    _require(_is_integer(length) and 0 <= length < 2**31, "--length", length, "from 0 to 2^31 - 1")


def check_seed(seed: int, bits: int = 64) -> None:
    """Check the seed of random numbers; a run adds the numbers of its epochs to one of 63 bits.

    Raises: UserError.
    """
    _require(_is_integer(seed) and 0 <= seed < 2**bits, "--seed", seed, f"in [0, 2^{bits})")


def check_sampling(temperature: float, top_k: int, top_p: float, min_p: float) -> None:
    """Check the options that shape the distribution a character is drawn from.

    Raises: UserError naming the option, its value and what is allowed.
    """
    for option, value in (("--temperature", temperature), ("--top-p", top_p), ("--min-p", min_p)):
        _require(isinstance(value, numbers.Real), option, value, "a number")
    _require(0 <= temperature < math.inf, "--temperature", temperature, "a finite number of at least 0")
    _require(_is_integer(top_k) and top_k >= 0, "--top-k", top_k, "at least 0")
    _require(0 < top_p <= 1, "--top-p", top_p, "in (0, 1]")
    _require(0 <= min_p <= 1, "--min-p", min_p, "in [0, 1]")


def _is_integer(value: object) -> bool:
    return isinstance(value, numbers.Integral)


def described(value: object) -> str:
    """A value that is no string, for an error that expected one."""
    return "bytes; decode them first" if isinstance(value, bytes | bytearray) else f"{value!r:.50}"


def _flag(option: str) -> str:
    return "--" + option.replace("_", "-")
