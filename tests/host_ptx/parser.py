"""Reads the PTX that NVRTC makes of a source, in one pass: each statement with its PTX line and CUDA source line.

Source: PTX ISA, "Syntax" and "Directives". Directives that change nothing on a CPU are skipped.
"""

import re
from typing import NamedTuple

__all__ = ["Function", "Location", "Module", "Parameter", "PtxSyntaxError", "Statement", "Variable", "parse"]


class PtxSyntaxError(RuntimeError):
    """A text that the parser does not know."""


class Location(NamedTuple):
    """A line of CUDA source."""

    file: str
    line: int

    def __str__(self):
        return f"{self.file}:{self.line}"


class Variable(NamedTuple):
    """A variable in global or shared memory."""

    name: str
    type: str  # such as u32
    alignment: int
    count: int  # of elements; 0 for the dynamic shared memory
    value: str  # "" without initial value


class Parameter(NamedTuple):
    """A parameter of a function, or an argument of a call."""

    name: str
    type: str
    count: int  # more than 1 for a structure, which is bytes


class Statement(NamedTuple):
    """An instruction, a label, a brace, or a declaration of registers or parameters."""

    kind: str  # "instruction", "label", "{", "}", "reg", "param"
    line: int  # of the PTX, from 1
    location: Location | None
    text: str
    guard: str = ""  # "%p1" or "!%p1" of an instruction
    operation: str = ""  # with all modifiers
    operands: tuple[str, ...] = ()


class Function(NamedTuple):
    """An ``.entry``, or a ``.func`` that entries call."""

    name: str
    entry: bool
    returns: tuple[Parameter, ...]
    parameters: tuple[Parameter, ...]
    statements: list[Statement]
    shared: tuple[Variable, ...]


class Module(NamedTuple):
    """A whole PTX text."""

    functions: dict[str, Function]
    shared: dict[str, Variable]  # static, of the whole module
    dynamic: tuple[str, ...]  # names of the dynamic shared memory
    globals: dict[str, Variable]


_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_SPACE = re.compile(r"\s*")
_LINE_DIRECTIVE = re.compile(r"\.(?:version|target|address_size|maxntid|minnctapersm|maxnreg|reqntid)\b[^\n]*")
_FILE = re.compile(r'\.file\s+(\d+)\s+"([^"]*)"[^\n]*')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)[^\n]*")
_SECTION = re.compile(r"\.section\s+[^{]*\{[^}]*\}")
_PRAGMA = re.compile(r'\.pragma\s+"[^"]*"\s*;')
_HEADER = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(entry|func)\s*(?:\(([^)]*)\)\s*)?([\w$]+)\s*"
                     r"(?:\(([^)]*)\))?[^{;]*([{;])")
_VARIABLE = re.compile(r"(?:\.(?:visible|weak|extern)\s+)*\.(global|const|shared)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+"
                       r"([\w$]+)\s*(?:\[(\d*)\])?\s*(?:=\s*([^;]*?))?\s*;")
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+\d+\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
                        r"([\w$]+)(?:\[(\d+)\])?")
_LABEL = re.compile(r"([$\w]+):")
_STATEMENT = re.compile(r"[^;{}]*(?:\{[^{}]*\}[^;{}]*)*;")
_INSTRUCTION = re.compile(r"(?:@(!?%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^{}]*\}|\[[^\]]*\]|\([^()]*\)|[^,\s]+")


def parse(text: str) -> Module:
    """The module of a PTX text.

    Raises: PtxSyntaxError.
    """
    return _Parser(text).module()


class _Parser:
    def __init__(self, text: str):
        self._text = _COMMENT.sub(lambda comment: "\n" * comment[0].count("\n"), text)
        self._position, self._line, self._counted = 0, 1, 0
        files = {match[1]: match[2] for match in _FILE.finditer(self._text)}
        self._files = {number: name[name.rfind("kernels/"):] if "kernels/" in name else name
                       for number, name in files.items()}
        self._location: Location | None = None

    def module(self) -> Module:
        module = Module({}, {}, (), {})
        dynamic = []
        while self._more():
            if self._skipped():
                continue
            if header := self._take(_HEADER):
                if header[5] == "{":
                    function = self._function(header)
                    module.functions[function.name] = function
            elif match := self._take(_VARIABLE):
                variable = _variable(match)
                if match[1] != "shared":
                    module.globals[variable.name] = variable
                elif variable.count:
                    module.shared[variable.name] = variable
                else:
                    dynamic.append(variable.name)
            else:
                self._fail()
        return module._replace(dynamic=tuple(dynamic))

    def _function(self, header: re.Match) -> Function:
        statements, shared, depth = [], [], 1
        self._location = None
        while depth:
            if not self._more():
                self._fail()
            if self._skipped():
                continue
            line = self._line_number()
            character = self._text[self._position]
            if character in "{}":
                self._position += 1
                depth += 1 if character == "{" else -1
                if depth:
                    statements.append(Statement(character, line, self._location, character))
            elif label := self._take(_LABEL):
                statements.append(Statement("label", line, self._location, label[1]))
            elif character == "." and (variable := self._take(_VARIABLE)):
                shared.append(_variable(variable))
            elif match := self._take(_STATEMENT):
                statements.append(self._statement(match[0][:-1].strip(), line))
            else:
                self._fail()
        return Function(header[3], header[1] == "entry", _parameters(header[2]), _parameters(header[4]), statements,
                        tuple(shared))

    def _statement(self, text: str, line: int) -> Statement:
        if text.startswith((".reg", ".param")):
            return Statement(text[1:].split(None, 1)[0], line, self._location, text)
        match = _INSTRUCTION.fullmatch(text)
        if not match:
            raise PtxSyntaxError(f"PTX line {line}: {text}")
        return Statement("instruction", line, self._location, re.sub(r"\s+", " ", text), match[1] or "", match[2],
                         tuple(_OPERAND.findall(match[3])))

    def _skipped(self) -> bool:
        """Takes a directive that is no statement."""
        if self._text[self._position] != ".":
            return False
        if match := self._take(_LOC):
            if line := int(match[2]):  # 0 where the compiler names none
                self._location = Location(self._files.get(match[1], match[1]), line)
            return True
        return any(self._take(pattern) for pattern in (_LINE_DIRECTIVE, _FILE, _SECTION, _PRAGMA))

    def _more(self) -> bool:
        self._position = _SPACE.match(self._text, self._position).end()
        return self._position < len(self._text)

    def _take(self, pattern: re.Pattern) -> re.Match | None:
        match = pattern.match(self._text, self._position)
        if match:
            self._position = match.end()
        return match

    def _line_number(self) -> int:
        self._line += self._text.count("\n", self._counted, self._position)
        self._counted = self._position
        return self._line

    def _fail(self):
        rest = self._text[self._position:self._position + 100].strip() or "the end of the text"
        raise PtxSyntaxError(f"PTX line {self._line_number()}: {rest}")


def _variable(match: re.Match) -> Variable:
    count = 1 if match[5] is None else int(match[5] or 0)
    return Variable(match[4], match[3], int(match[2] or 1), count, match[6] or "")


def _parameters(text: str | None) -> tuple[Parameter, ...]:
    return tuple(parameter(part.strip()) for part in (text or "").split(",") if part.strip())


def parameter(text: str) -> Parameter:
    """A declaration ``.param .b32 x`` or ``.param .align 4 .b8 x[16]``."""
    match = _PARAMETER.fullmatch(text)
    if not match:
        raise PtxSyntaxError(f"parameter {text}")
    return Parameter(match[2], match[1], int(match[3] or 1))
