"""Mistakes to plant in Python code: a line changed as a slip of the hand would change it.

The single-line part of what SWE-smith calls procedural modification (arXiv 2504.21798): operators and
comparisons exchanged, constants off by one, conditions turned round, arguments swapped. Whether a mistake
is one is for the repository's tests to say (swe_maker.py).
"""

import ast
import re
from collections.abc import Callable
from typing import NamedTuple

from envs_host.swe_workspace import split_lines

KINDS = ("comparison", "boolean", "arithmetic", "constant", "negation", "condition", "arguments", "loop")

_BOM = "\ufeff"  # Files may begin with it, and texts for `ast` may not.
_COMPARISONS = {
    "<=": "<", "<": "<=", ">=": ">", ">": ">=", "==": "!=", "!=": "==",
    "is not": "is", "is": "is not", "not in": "in", "in": "not in",
}  # fmt: skip
_BOOLEANS = {"and": "or", "or": "and"}
_ARITHMETIC = {"+": "-", "-": "+", "**": "*", "*": "+", "//": "/", "/": "*", "%": "//"}


class Bug(NamedTuple):
    """A line to change.

    Attributes:
        line: its number, from 1.
        before, after: its text, without the line end.
        kind: one of `KINDS`.
        function: name of the function that it is in, with those and the classes around it.
        body_line: where the code of that begins, below what documents it.
    """

    line: int
    before: str
    after: str
    kind: str
    function: str
    body_line: int


def find(source: str) -> list[Bug]:
    """All mistakes that can be made in the functions of a file, in their order.

    A few change nothing, or leave no Python: ask `is_program` of the one that is chosen.

    Raises:
        SyntaxError: it is not Python.
    """
    source = source.removeprefix(_BOM)
    finder = _Finder(source)
    finder.visit(ast.parse(source))
    return list(dict.fromkeys(finder.found))


def plant(source: str, bug: Bug) -> str:
    """The file with the mistake in it."""
    lines = split_lines(source.removeprefix(_BOM))
    whole = lines[bug.line - 1]
    lines[bug.line - 1] = bug.after + whole[len(whole.rstrip("\r\n")) :]
    return _BOM * source.startswith(_BOM) + "".join(lines)


def is_program(source: str, bug: Bug) -> bool:
    """Whether the file with the mistake in it is still Python, and another program than without."""
    try:
        one, other = (ast.parse(text.removeprefix(_BOM)) for text in (plant(source, bug), source))
        return ast.dump(one) != ast.dump(other)
    except SyntaxError:
        return False


class _Finder(ast.NodeVisitor):
    def __init__(self, source: str):
        self.found: list[Bug] = []
        # Python counts columns in bytes.
        self._lines = [line.rstrip("\r\n").encode() for line in split_lines(source)]
        self._inside: list[tuple[str, int]] = []  # Classes and functions around, and where their code begins.
        self._depth = 0  # How many of them are functions.

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        self._enter(node, is_function=False)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self._enter(node, is_function=True)

    def visit_AsyncFunctionDef(self, node: ast.AsyncFunctionDef) -> None:
        self._enter(node, is_function=True)

    def _enter(self, node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef, *, is_function: bool) -> None:
        is_documented = len(node.body) > 1 and ast.get_docstring(node) is not None
        self._inside.append((node.name, node.body[is_documented].lineno))
        self._depth += is_function
        for statement in node.body:
            self.visit(statement)
        self._depth -= is_function
        self._inside.pop()

    def visit_Compare(self, node: ast.Compare) -> None:
        operands = [node.left, *node.comparators]
        for left, right in zip(operands, operands[1:]):
            self._exchange("comparison", left, right, _COMPARISONS)
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        for left, right in zip(node.values, node.values[1:]):
            self._exchange("boolean", left, right, _BOOLEANS)
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        # What % formats is a text, and other operators do not go with one.
        if not isinstance(node.left, ast.Constant | ast.JoinedStr) or not isinstance(node.op, ast.Mod):
            self._exchange("arithmetic", node.left, node.right, _ARITHMETIC)
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        if isinstance(node.value, bool):
            self._replace("constant", node, node, lambda text: str(not node.value))
        elif isinstance(node.value, int):
            self._replace("constant", node, node, lambda text: str(node.value + 1))
            if node.value > 0:
                self._replace("constant", node, node, lambda text: str(node.value - 1))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if isinstance(node.op, ast.Not):
            self._replace("negation", node, node, lambda text: re.sub(r"^not\b\s*", "", text))
        self.generic_visit(node)

    def visit_If(self, node: ast.If) -> None:
        self._turn_round(node.test)
        self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self._turn_round(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self._turn_round(node.test)
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        for one, two in zip(node.args, node.args[1:]):
            if not isinstance(one, ast.Starred) and not isinstance(two, ast.Starred):
                first, second = self._text(one, one), self._text(two, two)
                between = self._text(one, two)
                if None not in (first, second, between):
                    comma = between[len(first) : len(between) - len(second)]
                    self._replace("arguments", one, two, lambda text, s=second + comma + first: s)
        self.generic_visit(node)

    def visit_Break(self, node: ast.Break) -> None:
        self._replace("loop", node, node, lambda text: "continue")

    def visit_Continue(self, node: ast.Continue) -> None:
        self._replace("loop", node, node, lambda text: "break")

    def _turn_round(self, test: ast.expr) -> None:
        if not isinstance(test, ast.UnaryOp | ast.Constant):
            simple = isinstance(test, ast.Name | ast.Call | ast.Attribute)
            self._replace("condition", test, test, lambda text: f"not {text}" if simple else f"not ({text})")

    def _exchange(self, kind: str, left: ast.expr, right: ast.expr, table: dict[str, str]) -> None:
        """Exchanges the operator between two operands."""
        one, between, two = self._text(left, left), self._text(left, right), self._text(right, right)
        if None in (one, between, two):
            return
        operator = between[len(one) : len(between) - len(two)]
        # Brackets may stand around the operands.
        match = re.fullmatch(r"([)\s]*)(.*?)([(\s]*)", operator, re.DOTALL)
        said = " ".join(match[2].split())
        if said in table:
            self._replace(kind, left, right, lambda text: one + match[1] + table[said] + match[3] + two)

    def _replace(self, kind: str, first: ast.AST, last: ast.AST, change: Callable[[str], str]) -> None:
        """Notes the line with the text from one node to another changed, if it is one line, in a function."""
        text = self._text(first, last)
        if text is None or not self._depth:
            return
        line = self._lines[first.lineno - 1]
        after = line[: first.col_offset] + change(text).encode() + line[last.end_col_offset :]
        function = ".".join(name for name, _ in self._inside)
        self.found.append(
            Bug(first.lineno, line.decode(), after.decode(), kind, function, self._inside[-1][1])
        )

    def _text(self, first: ast.AST, last: ast.AST) -> str | None:
        if first.lineno != last.end_lineno:
            return None
        return self._lines[first.lineno - 1][first.col_offset : last.end_col_offset].decode()
