"""Translates a parsed PTX module to C++ for the fibers of tests/host_cuda.

Registers become local variables, labels goto's, shared memory offsets in one buffer. Each rule below knows one kind of
instruction with exactly the modifiers that its pattern names; anything else raises Untranslated.

Source: PTX ISA, "Instructions", which has a section for each instruction, under its name.
"""

import functools
import json
import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

from tests.host_ptx.parser import Function, Module, Statement, Variable, parameter
from tests.host_ptx.registers import Step, uncertain_reads

__all__ = ["Translated", "Untranslated", "translate"]

C_TYPES = {"u8": "u8", "u16": "u16", "u32": "u32", "u64": "u64", "s8": "s8", "s16": "s16", "s32": "s32", "s64": "s64",
           "b8": "u8", "b16": "u16", "b32": "u32", "b64": "u64", "f32": "f32", "f64": "f64", "pred": "bool"}
FLOATS = {"f32": "u32", "f64": "u64"}  # float -> the type of its bits
POISON = {"f32": "F(~0u)", "f64": "bits<f64>(~u64(0))", "bool": "false"}
SPECIAL = {"tid": "threadIdx", "ntid": "blockDim", "ctaid": "blockIdx", "nctaid": "gridDim"}
COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "lo": "<", "ls": "<=", "hi": ">",
            "hs": ">="}
UNORDERED = {"equ": "!=", "neu": "==", "ltu": ">=", "leu": ">", "gtu": "<=", "geu": "<"}  # true where this is false
SCOPES = "(gpu|cta|sys)"
SIGNS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
ALIGNMENT = 16  # of the dynamic shared memory, and of the end of the static


class Untranslated(RuntimeError):
    """An instruction that no rule knows."""


class Translated(NamedTuple):
    """The C++ of a module, and which statements each of its basic blocks has."""

    text: str
    blocks: list[tuple[str, list[Statement]]]  # function, statements; the number of a block is its index


Text = Callable[["_Code", Statement, re.Match], str]
"""The C++ of an instruction, whose operation a rule's pattern matches."""

RULES: list[tuple[re.Pattern, Text]] = []


def rule(pattern: str):
    """Registers a function for the operations that a pattern matches in full."""
    def register(function: Text) -> Text:
        RULES.append((re.compile(pattern), function))
        return function

    return register


def translate(module: Module, capability: int, worst: bool = False, weak: bool = False,
              banks: bool = False) -> Translated:
    """The C++ of all kernels of a module for a compute capability, times ten.

    worst: approximate instructions and sums inside mma err as much as hardware may. weak: global memory is as late and
    as stale as it may be. banks: accesses to shared memory are kept, for bank_conflicts.py.

    Raises: Untranslated.
    """
    blocks: list[tuple[str, list[Statement]]] = []
    functions = [_Code(module, function, blocks) for function in module.functions.values()]
    bodies = [code.text() for code in functions]  # fills blocks
    entries = "".join(code.table_entry() for code in functions if code.function.entry)
    # Without `worst`, architectures that have the same PTX share a library.
    head = (f"#define PTX_CAPABILITY {capability}\n#define PTX_WORST\n" * worst + "#define PTX_WEAK\n" * weak +
            "#define PTX_BANKS\n" * banks + '#include "tensor_cores.h"\n' +
            f"PTX_EXPORT u8 ptx_executed[{max(len(blocks), 1)}] = {{}};\n")
    variables = "".join(_global(variable) for variable in module.globals.values())
    prototypes = "".join(code.head() + ";\n" for code in functions)
    table = f"const host_cuda::Kernel host_cuda::kernels[] = {{{entries}{{nullptr, nullptr, nullptr, 0}}}};\n"
    return Translated("\n".join((head, variables, prototypes, *bodies, table, _source_lines(module))), blocks)


def _source_lines(module: Module) -> str:
    """The function source_line() of report.h: a row for each PTX line from which on the CUDA source line is another."""
    rows, before = [], None
    for function in module.functions.values():
        for statement in function.statements:
            if statement.location != before:
                rows.append(f"{{{statement.line}, {json.dumps(str(statement.location or 'no source line'))}}}, ")
                before = statement.location
    return ("static const char *source_line(int line)\n{\n"
            "static const struct { int line; const char *source; } rows[] = {{0, \"no source line\"}, "
            + "".join(rows) + "};\nconst char *source = nullptr;\n"
            "for (const auto &row : rows) if (row.line <= line) source = row.source;\nreturn source;\n}\n")


def _global(variable: Variable) -> str:
    """A variable of the module, in global memory."""
    c = C_TYPES[variable.type]
    values = [value.strip() for value in variable.value.strip("{}").split(",") if value.strip()]
    return (f"alignas({variable.alignment}) [[maybe_unused]] static {c} g_{_name(variable.name)}"
            f"[{variable.count}] = {{{', '.join(f'{c}({value})' for value in values)}}};\n")


def _name(name: str) -> str:
    return re.sub(r"\W|\$", "_", name.lstrip("%"))


def _size(type_: str) -> int:
    return 1 if type_ == "pred" else int(type_[1:]) // 8


class _Code:
    """The C++ of one function."""

    def __init__(self, module: Module, function: Function, blocks: list):
        self.module, self.function, self._blocks = module, function, blocks
        self._classes: dict[str, str] = {}  # register -> C type
        called = [variable for other in module.functions.values() if not other.entry for variable in other.shared]
        own = function.shared if function.entry else ()  # behind those of the functions that any kernel may call
        self._offsets, self.shared_bytes = _layout((*module.shared.values(), *called, *own), module.dynamic)
        self.marks = any(".nc." in statement.operation for statement in function.statements)
        self._declared: list[str] = []
        self._reads: list[str] = []  # registers, of the statement at hand
        self._writes: list[str] = []
        self._origins = _origins(function)

    def head(self) -> str:
        name = _name(self.function.name)
        if self.function.entry:
            given = ", ".join(f"{C_TYPES[p.type]} p_{_name(p.name)}" for p in self.function.parameters)
            return f"static void k_{name}({given})"
        given = "".join(f", u8 *q_{_name(p.name)}" for p in (*self.function.returns, *self.function.parameters))
        return f"[[gnu::noinline, maybe_unused]] static void f_{name}(const Shared &shared{given})"

    def table_entry(self) -> str:
        name = _name(self.function.name)
        return (f"[] {{ auto kernel = host_cuda::Trampoline<k_{name}>::kernel(\"{self.function.name}\"); "
                f"kernel.shared_bytes = {self.shared_bytes}; kernel.shared_shadow = true; "
                "return kernel; }(), ")

    def text(self) -> str:
        lines, open_block = [], False
        texts, steps = zip(*map(self._step, self.function.statements))
        uncertain = uncertain_reads(steps)
        flagged = set().union(*uncertain)
        for statement, text, step, unsure in zip(self.function.statements, texts, steps, uncertain):
            if statement.kind in ("label", "instruction") and (statement.kind == "label" or not open_block):
                if statement.kind == "label":
                    lines.append(f"{_name(statement.text)}: ;")
                lines.append(f"ptx_executed[{len(self._blocks)}] = 1;")
                self._blocks.append((self.function.name, []))
                open_block = True
            if statement.kind == "instruction":
                self._blocks[-1][1].append(statement)
                lines.append(_guarded(statement, text, unsure, flagged.intersection(step.writes)))
                open_block = statement.operation.split(".")[0] not in ("bra", "ret", "exit")
            elif statement.kind in "{}":
                lines.append(statement.text)
            elif statement.kind != "label":
                lines += [text, *(f"w_{name} = false;" for name in step.writes if name in flagged)]
        start = ["Poll poll;", *self._declared, *(f"bool w_{name} = false;" for name in sorted(flagged))]
        if self.function.entry:
            start = ["flush_subnormals();", "[[maybe_unused]] const Shared shared = shared_memory();", *start]
        return "\n".join((self.head(), "{", *start, *lines, "}", ""))

    def _step(self, statement: Statement) -> tuple[str, Step]:
        """The C++ of an instruction or a declaration, without its guard, and the registers that it reads and writes."""
        self._reads, self._writes, text = [], [], ""
        if statement.kind == "instruction":
            text = self._instruction(statement)
            if statement.guard:
                self._reads.append(_name(statement.guard.lstrip("!")))
        elif statement.kind in ("reg", "param"):
            text = self._declaration(statement)
        return text, Step(statement, tuple(self._reads), tuple(self._writes))

    def _declaration(self, statement: Statement) -> str:
        if statement.kind == "param":
            declared = parameter(statement.text)
            return f"alignas(16) u8 q_{_name(declared.name)}[{_size(declared.type) * declared.count}];"
        type_, names = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", statement.text, re.DOTALL).groups()
        several = re.fullmatch(r"%?([\w$]+)<(\d+)>", names)
        found = ([f"{several[1]}{i}" for i in range(int(several[2]))] if several
                 else [_name(name.strip()) for name in names.split(",")])
        c = C_TYPES[type_]
        self._classes |= dict.fromkeys(found, c)
        self._writes += found
        declaration = f"[[maybe_unused]] {c} " + ", ".join(f"r_{name} = {POISON.get(c, f'{c}(~u64(0))')}"
                                                            for name in found) + ";"
        if several:  # of the function: ahead of every label
            self._declared.append(declaration)
            return ""
        return declaration

    def _instruction(self, statement: Statement) -> str:
        text, match = _rule_of(statement.operation)
        if text is None:
            raise Untranslated(f"{self.function.name}, PTX line {statement.line}: {statement.text}")
        return text(self, statement, match)

    # ---- Operands ----

    def value(self, text: str, type_: str) -> str:
        """An operand as a number of a type; registers hold bits."""
        c = C_TYPES[type_]
        if c == "bool" and text.lstrip("-").isdigit():
            return str(bool(int(text))).lower()
        if match := re.fullmatch(r"0[fF]([0-9a-fA-F]{8})", text):
            return f"F(0x{match[1]}u)" if c == "f32" else f"{c}(0x{match[1]}u)"
        if match := re.fullmatch(r"0[dD]([0-9a-fA-F]{16})", text):
            return f"bits<f64>(u64(0x{match[1]}ull))" if c == "f64" else f"{c}(0x{match[1]}ull)"
        if match := re.fullmatch(r"-?(?:0x[0-9a-fA-F]+|\d+)U?", text):
            return f"{c}({int(match[0].rstrip('U'), 0) % 2**64:#x}ull)"
        if match := re.fullmatch(r"%(\w+)\.([xyz])", text):
            return f"{c}({SPECIAL[match[1]]}.{match[2]})"
        if text == "%laneid":
            return f"{c}(host_cuda::lane_in_warp())"
        register = _name(text)
        if register in self._classes:
            self._reads.append(register)
            held = self._classes[register]
            if c in FLOATS and held not in FLOATS:
                return f"bits<{c}>({FLOATS[c]}(r_{register}))"
            if held in FLOATS and c not in FLOATS:
                return f"{c}(bits<{FLOATS[held]}>(r_{register}))"
            return f"{c}(r_{register})"
        return f"{c}({self._address_of(text)})"

    def _address_of(self, name: str) -> str:
        if name in self._offsets:
            return str(self._offsets[name])
        if name in self.module.globals:
            return f"u64(&g_{_name(name)})"
        raise Untranslated(f"{self.function.name}: operand {name}")

    def assign(self, destination: str, expression: str, type_: str) -> str:
        """A statement that gives a register the bits of a value of a type."""
        register, c = _name(destination), C_TYPES[type_]
        if register == "_":
            return f"(void)({expression});"
        self._writes.append(register)
        held, expression = self._classes[register], f"{c}({expression})"
        if held in FLOATS and c not in FLOATS:
            expression = f"bits<{held}>({expression})"
        elif c in FLOATS and held not in FLOATS:
            expression = f"bits<{FLOATS[c]}>({expression})"
        return f"r_{register} = {held}({expression});"

    def computed(self, statement: Statement, template: str, type_: str, of: str = "") -> str:
        """The statement that gives the first operand an expression, of a type, of the other operands, of type `of`."""
        values = [self.value(operand, of or type_) for operand in statement.operands[1:]]
        return self.assign(statement.operands[0], template.format(*values), type_)

    def address(self, text: str, bits: int = 64) -> str:
        """An operand in brackets, a register or a name plus an offset."""
        base, offset = re.fullmatch(r"\[\s*([^+\s\]]+)\s*(?:\+\s*(-?\w+))?\s*\]", text).groups()
        return f"(u{bits}({self.value(base, f'u{bits}')}) + u{bits}({int(offset or '0', 0)}))"

    def marked(self, address: str, size: int, statement: Statement) -> str:
        """The statement that marks bytes as written, in a kernel with read-only loads."""
        return f"mark({address}, {size}, true, {statement.line}); " if self.marks else ""

    def array(self, text: str) -> str:
        """The number of the parameter whose array an address lies in, for the check of its bounds."""
        origin = self._origins.get(_name(re.fullmatch(r"\[\s*([^+\s\]]+).*\]", text)[1]))
        return "ANY_ARRAY" if origin is None or origin < 0 else str(origin)


def _guarded(statement: Statement, text: str, uncertain: set[str], flagged: set[str]) -> str:
    """The C++ of an instruction under its guard. The flag w_NAME says whether the register NAME is written: a read of
    a register of `uncertain` looks at its flag, a write of one of `flagged` sets it."""
    text += "".join(f" w_{name} = true;" for name in sorted(flagged))
    if statement.guard:
        text = f"if ({statement.guard[0].replace('%', '')}r_{_name(statement.guard.lstrip('!'))}) {{ {text} }}"
    for name in uncertain:
        text = re.sub(rf"\br_{name}\b(?! = )", f'checked(r_{name}, w_{name}, "{name}", {statement.line})', text)
    return text


@functools.cache
def _rule_of(operation: str) -> tuple[Text | None, re.Match | None]:
    for pattern, text in RULES:
        if match := pattern.fullmatch(operation):
            return text, match
    return None, None


def _layout(variables: Iterable[Variable], dynamic: Iterable[str]) -> tuple[dict[str, int], int]:
    """Offsets of all variables in shared memory, and the bytes of the static ones: the dynamic memory follows."""
    offsets, end = {}, 0
    for variable in variables:
        end = -(-end // variable.alignment) * variable.alignment
        offsets[variable.name] = end
        end += _size(variable.type) * variable.count
    end = -(-end // ALIGNMENT) * ALIGNMENT
    return offsets | dict.fromkeys(dynamic, end), end


_KEEPS_ORIGIN = re.compile(r"(?:add|sub)\.[su]64|mov\.[bu]64|cvta\.to\.global\.u64|selp\.[bu]64")
_SEVERAL = -1


def _origins(function: Function) -> dict[str, int]:
    """64-bit register -> the number of the parameter that its address comes from, or _SEVERAL."""
    parameters = {p.name: number for number, p in enumerate(function.parameters) if function.entry}
    origins: dict[str, int] = {}
    moves = []
    for statement in function.statements:
        if statement.operation in ("ld.param.u64", "ld.param.b64"):
            name = statement.operands[1].strip("[]")
            if name in parameters:
                origins[_name(statement.operands[0])] = parameters[name]
        elif _KEEPS_ORIGIN.fullmatch(statement.operation):
            moves.append([_name(operand) for operand in statement.operands])
    changed = True
    while changed:
        changed = False
        for destination, *sources in moves:
            found = {origins[source] for source in sources if source in origins}
            if destination in origins:
                found.add(origins[destination])
            if found:
                origin = found.pop() if len(found) == 1 else _SEVERAL
                changed |= origins.get(destination) != origin
                origins[destination] = origin
    return origins


def _true(condition: bool) -> str:
    return "true" if condition else "false"


def _scope(name: str | None) -> str:
    return "Scope::BLOCK" if name == "cta" else "Scope::GPU"


def _vector(text: str) -> list[str]:
    return [part.strip() for part in text.strip("{}").split(",")]


# ---- Control flow ---------------------------------------------------------------------------------------------------

@rule(r"bra(\.uni)?")
def _(code, statement, match):
    return f"goto {_name(statement.operands[0])};"


@rule(r"ret|exit")
def _(code, statement, match):
    return "return;"


@rule(r"call(\.uni)?")
def _(code, statement, match):
    lists = [_vector(operand.strip("()")) for operand in statement.operands if operand.startswith("(")]
    name = next(operand for operand in statement.operands if not operand.startswith("("))
    given = "".join(f", q_{_name(argument)}" for arguments in lists for argument in arguments if argument)
    return f"f_{_name(name)}(shared{given});"


# ---- Parameters -----------------------------------------------------------------------------------------------------

@rule(r"ld\.param(?:\.v[24])?\.(\w+)")
def _(code, statement, match):
    type_, registers = match[1], _vector(statement.operands[0])
    name, offset = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", statement.operands[1]).groups()
    source = f"p_{_name(name)}" if code.function.entry and name in {p.name for p in code.function.parameters} else None
    lines = []
    for i, register in enumerate(registers):
        start = f"reinterpret_cast<const u8 *>(&{source})" if source else f"q_{_name(name)}"
        at = int(offset or 0) + i * _size(type_)
        lines.append(f"{{ {C_TYPES[type_]} t; __builtin_memcpy(&t, {start} + {at}, sizeof(t)); "
                     + code.assign(register, "t", type_) + " }")
    return " ".join(lines)


@rule(r"st\.param(?:\.v[24])?\.(\w+)")
def _(code, statement, match):
    type_, lines = match[1], []
    name, offset = re.fullmatch(r"\[([\w$]+)(?:\+(\d+))?\]", statement.operands[0]).groups()
    for i, register in enumerate(_vector(statement.operands[1])):
        at = int(offset or 0) + i * _size(type_)
        lines.append(f"{{ const {C_TYPES[type_]} t = {code.value(register, type_)}; "
                     f"__builtin_memcpy(q_{_name(name)} + {at}, &t, sizeof(t)); }}")
    return " ".join(lines)


# ---- Memory ---------------------------------------------------------------------------------------------------------

@rule(rf"ld\.(?:(relaxed|acquire)\.{SCOPES}|volatile)\.global\.([usbf](?:32|64))")
def _(code, statement, match):
    c, array, line = C_TYPES[match[3]], code.array(statement.operands[1]), statement.line
    load = f"load_strong<{c}, {array}>(at, {_true(match[1] == 'acquire')}, {_scope(match[2])}, poll.is_waiting(at))"
    return (f"{{ const u64 at = {code.address(statement.operands[1])}; check_global<{array}>(at, sizeof({c}), {line}); "
            + code.assign(statement.operands[0], f"poll.read(at, written_value<{array}>({load}, at, {line}), {line})",
                          match[3]) + " }")


@rule(r"ld\.relaxed\.gpu\.global\.v2\.u64")  # each element is an access of its own
def _(code, statement, match):
    array, line = code.array(statement.operands[1]), statement.line
    lines = [f"const u64 at = {code.address(statement.operands[1])};", f"check_global<{array}>(at, 16, {line});"]
    for i, register in enumerate(_vector(statement.operands[0])):
        place = f"at + {8 * i}"
        load = f"load_strong<u64, {array}>({place}, false, Scope::GPU, poll.is_waiting({place}))"
        lines.append(f"const u64 t{i} = poll.read({place}, written_value<{array}>({load}, {place}, {line}), {line});")
        lines.append(code.assign(register, f"t{i}", "u64"))
    return "{ " + " ".join(lines) + " }"


@rule(rf"st\.(?:(relaxed|release)\.{SCOPES}|volatile)\.global\.([usbf](?:32|64))")
def _(code, statement, match):
    c, array = C_TYPES[match[3]], code.array(statement.operands[0])
    return (f"{{ const u64 at = {code.address(statement.operands[0])}; "
            f"check_global<{array}>(at, sizeof({c}), {statement.line}); {code.marked('at', _size(match[3]), statement)}"
            f"store_strong<{c}, {array}>(at, {code.value(statement.operands[1], match[3])}, "
            f"{_true(match[1] == 'release')}, {_scope(match[2])}); }}")


@rule(r"ld\.global(\.nc)?(?:\.v([24]))?\.(\w+)")
def _(code, statement, match):
    registers, type_, line = _vector(statement.operands[0]), match[3], statement.line
    array, size = code.array(statement.operands[1]), _size(match[3])
    lines = [f"const u64 at = {code.address(statement.operands[1])};",
             f"check_global<{array}>(at, {size * len(registers)}, {line});"]
    if match[1]:
        lines.append(f"mark(at, {size * len(registers)}, false, {line});")
    c = C_TYPES[type_]
    lines += [f"const {c} t{i} = written_value<{array}>(load_weak<{c}, {array}>(at + {i * size}), at + {i * size}, "
              f"{line});" for i in range(len(registers))]
    lines += [code.assign(register, f"t{i}", type_) for i, register in enumerate(registers)]
    return "{ " + " ".join(lines) + " }"


@rule(r"st\.global(?:\.v([24]))?\.(\w+)")
def _(code, statement, match):
    values, type_, line = _vector(statement.operands[1]), match[2], statement.line
    size = _size(type_)
    array, c = code.array(statement.operands[0]), C_TYPES[type_]
    lines = [f"const u64 at = {code.address(statement.operands[0])};",
             f"check_global<{array}>(at, {size * len(values)}, {line});",
             code.marked("at", size * len(values), statement)]
    lines += [f"store_weak<{c}, {array}>(at + {i * size}, {code.value(value, type_)});"
              for i, value in enumerate(values)]
    return "{ " + " ".join(lines) + " }"


@rule(r"ld\.(?:volatile\.)?shared(?:\.v([24]))?\.(\w+)")
def _(code, statement, match):
    registers, type_, line = _vector(statement.operands[0]), match[2], statement.line
    size, c = _size(type_), C_TYPES[type_]
    lines = [f"const u32 at = {code.address(statement.operands[1], 32)};",
             f"const u8 *from = load_shared<{size * len(registers)}>(shared, at, {line});"]
    lines += [f"const {c} t{i} = reinterpret_cast<const {c} *>(from)[{i}];" for i in range(len(registers))]
    lines += [code.assign(register, f"t{i}", type_) for i, register in enumerate(registers)]
    return "{ " + " ".join(lines) + " }"


@rule(r"st\.(?:volatile\.)?shared(?:\.v([24]))?\.(\w+)")
def _(code, statement, match):
    values, type_, line = _vector(statement.operands[1]), match[2], statement.line
    c = C_TYPES[type_]
    lines = [f"const u32 at = {code.address(statement.operands[0], 32)};",
             f"u8 *to = store_shared<{_size(type_) * len(values)}>(shared, at, {line});"]
    lines += [f"reinterpret_cast<{c} *>(to)[{i}] = {code.value(value, type_)};" for i, value in enumerate(values)]
    return "{ " + " ".join(lines) + " }"


@rule(r"cvta\.to\.global\.u64")
def _(code, statement, match):
    return code.assign(statement.operands[0], code.value(statement.operands[1], "u64"), "u64")


@rule(r"cp\.async\.c[ag]\.shared\.global")
def _(code, statement, match):
    to, source, size, *more = statement.operands
    copied = code.value(more[0], "u32") if more else size
    return (f"copy_async<{code.array(source)}, {size}>(shared, {code.address(to, 32)}, {code.address(source)}, "
            f"{copied}, {statement.line});")


@rule(r"cp\.async\.commit_group")
def _(code, statement, match):
    return "host_cuda::commit_copies();"


@rule(r"cp\.async\.wait_group")
def _(code, statement, match):
    return f"finish_copies(shared, {statement.operands[0]});"


@rule(rf"atom(?:\.(relaxed|acquire|release|acq_rel))?(?:\.{SCOPES})?\.(global|shared)\.(add|exch)\.([ub]32|u64)")
def _(code, statement, match):
    order, scope, space, operation, type_ = match.groups()
    c, (result, at, value), line = C_TYPES[type_], statement.operands, statement.line
    new = f"[&](const {c} old) {{ return {c}({'old + ' * (operation == 'add')}{code.value(value, type_)}); }}"
    if space == "shared":
        place = f"load_shared<sizeof({c})>(shared, {code.address(at, 32)}, {line})"
        change = (f"auto &at = *reinterpret_cast<{c} *>(u64({place})); "
                  f"const {c} old = at; at = ({new})(old);")
    else:
        array, acquire, release = code.array(at), order in ("acquire", "acq_rel"), order in ("release", "acq_rel")
        change = (f"const u64 at = {code.address(at)}; check_global<{array}>(at, sizeof({c}), {line}); "
                  + f"count_on(at, false, {line}); " * (operation == "add" and c == "u32")
                  + code.marked("at", _size(type_), statement) +
                  f"const {c} old = atomic_at<{c}, {array}>(at, {new}, {_true(acquire)}, {_true(release)}, "
                  f"{_scope(scope)});")
    return f"{{ {change} " + code.assign(result, "old", type_) + " }"


@rule(rf"red(?:\.(relaxed|release))?(?:\.{SCOPES})?\.global\.add\.u32")
def _(code, statement, match):
    at, value = statement.operands
    array = code.array(at)
    return (f"{{ const u64 at = {code.address(at)}; check_global<{array}>(at, 4, {statement.line}); "
            f"count_on(at, {_true(match[1] == 'release')}, {statement.line}); "
            f"host_cuda::count_group_barrier(reinterpret_cast<const unsigned *>(at)); "
            f"atomic_at<u32, {array}>(at, [&](const u32 old) {{ return old + {code.value(value, 'u32')}; }}, false, "
            f"{_true(match[1] == 'release')}, {_scope(match[2])}); }}")


@rule(r"membar\.(gl|cta)|fence\.(acq_rel|sc)\.(gpu|cta)")
def _(code, statement, match):
    return f"memory_fence({_true(match[2] != 'acq_rel')}, {_scope(match[1] or match[3])});"


# ---- Threads together -----------------------------------------------------------------------------------------------

@rule(r"bar\.sync")
def _(code, statement, match):
    if statement.operands != ("0",):
        raise Untranslated(f"{code.function.name}, PTX line {statement.line}: {statement.text}")
    # The compiler may make several instructions of one barrier: they have its source line in common.
    file, line = statement.location or ("no source line", 0)
    return f"host_cuda::sync_threads(\"{file}\", {line});"


@rule(r"bar\.warp\.sync")
def _(code, statement, match):
    return f"sync_warp({code.value(statement.operands[0], 'u32')}, {statement.line});"


@rule(r"shfl\.sync\.(up|down|bfly|idx)\.b32")
def _(code, statement, match):
    destination, _, predicate = statement.operands[0].partition("|")
    values = ", ".join(code.value(operand, "u32") for operand in statement.operands[1:])
    lines = ["bool inside;",
             code.assign(destination, f"shuffle<'{match[1][0]}'>({values}, inside, {statement.line})", "u32")]
    if predicate:
        lines.append(code.assign(predicate, "inside", "pred"))
    return "{ " + " ".join(lines) + " }"


@rule(r"vote\.sync\.any\.pred")
def _(code, statement, match):
    p, members = code.value(statement.operands[1], "pred"), code.value(statement.operands[2], "u32")
    return code.assign(statement.operands[0], f"vote_any({p}, {members}, {statement.line})", "pred")


@rule(r"mma\.sync\.aligned\.m16n8k(?:16\.row\.col\.f32\.(bf16)\.bf16|8\.row\.col\.f32\.(tf32)\.tf32)\.f32")
def _(code, statement, match):
    d, a, b, c = map(_vector, statement.operands)
    a, b = (", ".join(code.value(x, "u32") for x in registers) for registers in (a, b))
    c = ", ".join(code.value(x, "f32") for x in c)
    results = " ".join(code.assign(register, f"D[{i}]", "f32") for i, register in enumerate(d))
    return (f"{{ const u32 A[4] = {{{a}}}, B[2] = {{{b}}}; const f32 C[4] = {{{c}}}; f32 D[4]; "
            f"mma_{match[1] or match[2]}(D, A, B, C, {statement.line}); {results} }}")


@rule(r"ldmatrix\.sync\.aligned\.m8n8\.x4(\.trans)?\.shared\.b16")
def _(code, statement, match):
    results = " ".join(code.assign(register, f"D[{i}]", "u32")
                       for i, register in enumerate(_vector(statement.operands[0])))
    return (f"{{ u32 D[4]; const u32 at = {code.address(statement.operands[1], 32)}; "
            f"const u8 *row = load_shared<16>(shared, at, {statement.line}); "
            f"ldmatrix<{'true' if match[1] else 'false'}>(D, row, {statement.line}); {results} }}")


# ---- Moves, comparisons, logic --------------------------------------------------------------------------------------

@rule(r"mov\.(pred|[bu]16|[bsu]32|[bsu]64|f32|f64)")
def _(code, statement, match):
    to, source = statement.operands
    type_, width = match[1], 8 * _size(match[1])
    if to.startswith("{"):
        parts = _vector(to)
        part = f"b{width // len(parts)}"
        lines = " ".join(code.assign(register, f"t >> {i * width // len(parts)}", part)
                         for i, register in enumerate(parts))
        return f"{{ const u64 t = {code.value(source, f'b{width}')}; {lines} }}"
    if source.startswith("{"):
        parts = _vector(source)
        part = width // len(parts)
        value = " | ".join(f"u64({code.value(x, f'b{part}')}) << {i * part}" for i, x in enumerate(parts))
        return code.assign(to, value, f"b{width}")
    return code.assign(to, code.value(source, type_), type_)


@rule(r"setp\.(\w+)\.(?:ftz\.(f32)|(f64|[bsu]\d+))")
def _(code, statement, match):
    relation, type_ = filter(None, match.groups())
    a, b = (code.value(operand, type_) for operand in statement.operands[1:])
    if relation == "ne" and type_[0] == "f":
        text = f"{a} < {b} || {a} > {b}"
    elif relation in COMPARED:
        text = f"{a} {COMPARED[relation]} {b}"
    elif relation == "equ":
        text = f"!({a} < {b} || {a} > {b})"
    elif relation in UNORDERED:
        text = f"!({a} {UNORDERED[relation]} {b})"
    elif relation in ("nan", "num"):
        text = f"{'' if relation == 'nan' else '!'}({a} != {a} || {b} != {b})"
    else:
        raise Untranslated(f"{code.function.name}, PTX line {statement.line}: {statement.text}")
    return code.assign(statement.operands[0], text, "pred")


@rule(r"selp\.(\w+)")
def _(code, statement, match):
    a, b = (code.value(operand, match[1]) for operand in statement.operands[1:3])
    return code.assign(statement.operands[0], f"{code.value(statement.operands[3], 'pred')} ? {a} : {b}", match[1])


@rule(r"(and|or|xor)\.(pred|b16|b32|b64)")
def _(code, statement, match):
    return code.computed(statement, f"{{}} {SIGNS[match[1]]} {{}}", match[2])


@rule(r"not\.(pred|b16|b32|b64)")
def _(code, statement, match):
    return code.computed(statement, "!{}" if match[1] == "pred" else "~{}", match[1])


@rule(r"(shl|shr)\.([bsu](?:16|32|64))")
def _(code, statement, match):
    value, by = code.value(statement.operands[1], match[2]), code.value(statement.operands[2], "u32")
    return code.assign(statement.operands[0], f"{match[1]}<{C_TYPES[match[2]]}>({value}, {by})", match[2])


# ---- Integers -------------------------------------------------------------------------------------------------------

@rule(r"(add|sub)\.[su](16|32|64)")
def _(code, statement, match):
    return code.computed(statement, f"{{}} {SIGNS[match[1]]} {{}}", f"u{match[2]}")


@rule(r"(mul|mad)\.lo\.[su](16|32|64)")
def _(code, statement, match):
    return code.computed(statement, "u64({}) * u64({})" + " + {}" * (match[1] == "mad"), f"u{match[2]}")


@rule(r"mul\.wide\.([su])(16|32)")
def _(code, statement, match):
    wide = match[1] + str(2 * int(match[2]))
    return code.computed(statement, f"{wide}({{}}) * {wide}({{}})", wide, of=match[1] + match[2])


@rule(r"mul\.hi\.([su])(16|32|64)")
def _(code, statement, match):
    wide = "unsigned __int128" if match[1] == "u" else "__int128"
    return code.computed(statement, f"({wide})({{}}) * ({wide})({{}}) >> {match[2]}", match[1] + match[2])


@rule(r"(div|rem|min|max)\.([su](?:16|32|64))")
def _(code, statement, match):
    text = {"div": "divided({}, {})", "rem": "remainder_of({}, {})", "min": "{0} < {1} ? {0} : {1}",
            "max": "{0} > {1} ? {0} : {1}"}[match[1]]
    return code.computed(statement, text, match[2])


@rule(r"neg\.s(16|32|64)")
def _(code, statement, match):
    return code.computed(statement, "0 - {}", f"u{match[1]}")


@rule(r"bfi\.(b32|b64)")
def _(code, statement, match):
    return code.computed(statement, f"bfi<{C_TYPES[match[1]]}>({{}}, {{}}, u32({{}}), u32({{}}))", match[1])


@rule(r"shf\.l\.wrap\.b32")
def _(code, statement, match):
    return code.computed(statement, "u32((u64({1}) << 32 | {0}) << ({2} & 31) >> 32)", "b32")


@rule(r"prmt\.b32")  # the mode without a name: each byte of the result is chosen by four bits, of which one is a sign
def _(code, statement, match):
    return code.computed(statement, "permuted_bytes({}, {}, {})", "b32")


@rule(r"clz\.(b32|b64)")
def _(code, statement, match):
    return code.computed(statement, "clz({})", "u32", of=match[1])


# ---- Floats: every float kernel is compiled with -ftz=true, and flush_subnormals() makes the CPU flush --------------

@rule(r"(add|sub|mul)\.(ftz\.f32|f64)")
def _(code, statement, match):
    return code.computed(statement, f"{{}} {SIGNS[match[1]]} {{}}", match[2][-3:])


@rule(r"div\.rn\.(ftz\.f32|f64)")
def _(code, statement, match):
    return code.computed(statement, "{} / {}", match[1][-3:])


@rule(r"fma\.rn\.(ftz\.f32|f64)")
def _(code, statement, match):
    return code.computed(statement, "std::fma({}, {}, {})", match[1][-3:])


@rule(r"fma\.rm\.ftz\.f32")
def _(code, statement, match):
    return code.computed(statement, "fma_down({}, {}, {})", "f32")


@rule(r"(ex2|rcp|rsqrt)\.approx\.ftz\.f32")
def _(code, statement, match):
    return code.computed(statement, f"{match[1]}_approx({{}})", "f32")


@rule(r"div\.approx\.ftz\.f32")
def _(code, statement, match):
    return code.computed(statement, "div_approx({}, {})", "f32")


@rule(r"sqrt\.rn\.ftz\.f32")
def _(code, statement, match):
    return code.computed(statement, "std::sqrt({})", "f32")


@rule(r"(max|min)\.ftz\.f32")
def _(code, statement, match):
    return code.computed(statement, "largest({}, {})" if match[1] == "max" else "smallest({}, {})", "f32")


@rule(r"(neg|abs)\.ftz\.f32")
def _(code, statement, match):
    return code.computed(statement, "-flushed({})" if match[1] == "neg" else "std::fabs(flushed({}))", "f32")


@rule(r"copysign\.f32")
def _(code, statement, match):
    return code.computed(statement, "std::copysign({1}, {0})", "f32")


# ---- Conversions ----------------------------------------------------------------------------------------------------

@rule(r"cvt\.([su](?:8|16|32|64))\.([su](?:8|16|32|64))|cvt\.rn\.(f32|f64)\.([su](?:32|64))"
      r"|cvt\.ftz\.(f64)\.(f32)|cvt\.rn\.ftz\.(f32)\.(f64)")
def _(code, statement, match):
    to, source = filter(None, match.groups())
    return code.computed(statement, "{}", to, of=source)


@rule(r"cvt\.ftz\.sat\.f32\.f32")
def _(code, statement, match):
    return code.computed(statement, "saturated({})", "f32")


@rule(r"cvt\.rn\.bf16\.f32")
def _(code, statement, match):
    return code.computed(statement, "bf16_of({})", "b16", of="f32")


@rule(r"cvt\.rn\.bf16x2\.f32")
def _(code, statement, match):
    return code.computed(statement, "bf16_of({}) << 16 | bf16_of({})", "b32", of="f32")


@rule(r"cvt\.rna\.tf32\.f32")
def _(code, statement, match):
    return code.computed(statement, "tf32_of({})", "b32", of="f32")
