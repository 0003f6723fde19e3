"""The text of an ALFWorld game: its grammar (TWL2) read once, answers derived from facts.

TextWorld derives every answer by copying symbols and their context at each expansion and by
parsing queries again each time, which is where an ALFWorld step spends most of its time. Here a
grammar is read into tuples, once per process (games differ from each other in the sentence of the
task only), and queries go to indexed facts. The rules of the derivation are TextWorld's
(textworld/envs/pddl/textgen):

- the first production whose condition has a match is taken;
- a query's answers come in the order of the sorted facts, and two placeholders never share a value;
- `[{x | query}]` is a list with the grammar's own separators, and what it says for an empty one.

What a production may compute is limited to attributes of entities, texts, `+` and `or`; TextWorld
calls `eval` on it, and a game file is somebody else's.
"""

import ast
import functools
import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

from envs_host.alfworld_pddl import Facts, World

# Placeholder (name, type) -> object, as far as it is bound.
Mapping_ = Mapping[tuple[str, str], str]

_ACTION = re.compile(
    r'action\s+([\w/-]+)\s*\{(.*?)\n\}', re.DOTALL)
_TEMPLATE = re.compile(r'template\s*::\s*"([^"]*)"\s*;')
_FEEDBACK = re.compile(r'feedback\s*::\s*"([^"]*)"\s*;')
_GRAMMAR = re.compile(r'grammar\s*::\s*"""(.*?)"""\s*;', re.DOTALL)
_ATOM = re.compile(r"\s*([\w/-]+)\s*\(([^)]*)\)\s*")
_NONTERMINAL = re.compile(r"#([\w()/!<>\-\s,.]+)#")
_LITERAL = re.compile(r'[^;|"<>\[\]#{}]+')
_CONDITIONAL = re.compile(r"\{([^|\[\]{}\n]+)(?:\s*\|\s*([^;|{}\n\[\]#]+))?\}")


class GrammarError(ValueError):
    """A text is not a TWL2 grammar, or uses what is not supported."""


class Entity(NamedTuple):
    """What a production may ask of an object."""

    id: str
    name: str
    definite: str = "the"
    indefinite: str = "a"


class Query(NamedTuple):
    """A conjunction: (predicate, placeholders) pairs."""

    atoms: tuple[tuple[str, tuple[tuple[str, str], ...]], ...]


class Symbol(NamedTuple):
    """A piece of a production.

    Attributes:
        kind: "text", "rule" or "value".
        content: the text, the rule's name or a function of the named entities.
        query: expands the piece once per answer; None expands it once.
        is_list: with separators between.
    """

    kind: str
    content: Any
    query: Query | None = None
    is_list: bool = False


class Production(NamedTuple):
    condition: Query | None
    symbols: tuple[Symbol, ...]


class Grammar(NamedTuple):
    """`templates` and `feedback` are by action, lower case; `read` are the predicates asked for."""

    templates: dict[str, tuple[Symbol, ...]]
    feedback: dict[str, str]
    rules: dict[str, tuple[Production, ...]]
    read: frozenset[str]


def parse(text: str) -> Grammar:
    """Reads a grammar.

    Raises:
        GrammarError: it is damaged or uses what is not supported.
    """
    templates, feedback = {}, {}
    rules: dict[str, tuple[Production, ...]] = {}
    for name, body in _ACTION.findall(text):
        template, rule = _TEMPLATE.search(body), _FEEDBACK.search(body)
        if template is None or rule is None:
            raise GrammarError(f"action {name} of the grammar lacks its template or its feedback")
        templates[name.lower()] = _symbols(template[1])
        feedback[name.lower()] = rule[1].strip("#")
    if not templates:
        raise GrammarError("the grammar has no actions: it is cut short or damaged")
    for block in _GRAMMAR.findall(text):
        lines = [line for line in block.split("\n") if not line.lstrip().startswith("#")]
        try:
            productions = json.loads("\n".join(lines))
        except ValueError as error:
            raise GrammarError(f"a block of the grammar is not JSON: {error}") from error
        for name, made in productions.items():
            rules[name] = tuple(_productions(json.dumps(made)))
    queries = [p.condition for made in rules.values() for p in made if p.condition]
    pieces = [s for made in rules.values() for p in made for s in p.symbols]
    pieces += [s for template in templates.values() for s in template]
    queries += [piece.query for piece in pieces if piece.query]
    read = frozenset(predicate for query in queries for predicate, _ in query.atoms)
    return Grammar(templates, feedback, rules, read)


@functools.lru_cache(maxsize=4096)
def _productions(productions: str) -> tuple[Production, ...]:
    # Kept by text, so that games of one version share all but the sentence of their task.
    return tuple(
        Production(
            _query(production["condition"]) if production.get("condition") else None,
            _symbols(production["rhs"]),
        )
        for production in json.loads(productions)
    )


@functools.lru_cache(maxsize=1024)
def _symbols(text: str) -> tuple[Symbol, ...]:
    """Reads the right side of a production; what cannot be read ends it (as in TextWorld)."""
    # TextWorld's reader takes white space at the very start of a production for a comment.
    text = text.replace("\\n", "\n").lstrip()
    made, at = [], 0
    while at < len(text):
        if text[at] == "[":
            inner = _CONDITIONAL.match(text, at + 1)
            if inner is None or text[inner.end():inner.end() + 1] != "]":
                break
            made.append(_conditional(inner)._replace(is_list=True))
            at = inner.end() + 1
        elif text[at] == "{":
            inner = _CONDITIONAL.match(text, at)
            if inner is None:
                break
            made.append(_conditional(inner))
            at = inner.end()
        elif text[at] == "#":
            inner = _NONTERMINAL.match(text, at)
            if inner is None:
                break
            made.append(Symbol("rule", inner[1]))
            at = inner.end()
        else:
            literal = _LITERAL.match(text, at)
            if literal is None:
                break
            made.append(Symbol("text", literal[0]))
            at = literal.end()
    return tuple(made)


def _conditional(match: re.Match) -> Symbol:
    expression, given = match[1].strip(), match[2]
    query = _query(given) if given else None
    rule = _NONTERMINAL.fullmatch(expression)
    if rule is not None:
        return Symbol("rule", rule[1], query)
    return Symbol("value", _value(expression), query)


@functools.lru_cache(maxsize=1024)
def _query(text: str) -> Query:
    atoms = []
    for part in text.split("&"):
        match = _ATOM.fullmatch(part)
        if match is None:
            raise GrammarError(f"{text!r} is not a query of the grammar")
        placeholders = []
        for argument in filter(None, (argument.strip() for argument in match[2].split(","))):
            name, _, type_ = argument.partition(":")
            placeholders.append((name.strip(), type_.strip() or name.strip()))
        atoms.append((match[1], tuple(placeholders)))
    return Query(tuple(atoms))


@functools.lru_cache(maxsize=1024)
def _value(expression: str) -> Callable[[Mapping[str, Entity]], str]:
    """A function of the named entities out of an expression."""

    def compile_(node: ast.expr) -> Callable[[Mapping[str, Entity]], Any]:
        match node:
            case ast.Name(id=name):
                return lambda entities: entities[name].name
            case ast.Attribute(value=ast.Name(id=name), attr=attribute) if (
                attribute in Entity._fields
            ):
                place = Entity._fields.index(attribute)
                return lambda entities: entities[name][place]
            case ast.Constant(value=str(value)):
                return lambda entities: value
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                one, two = compile_(left), compile_(right)
                return lambda entities: one(entities) + two(entities)
            case ast.BoolOp(op=ast.Or(), values=values):
                options = [compile_(value) for value in values]
                return lambda entities: next(
                    (value for option in options[:-1] if (value := option(entities))),
                    options[-1](entities),
                )
        raise GrammarError(f"the grammar computes {expression!r}, which is not supported")

    try:
        return compile_(ast.parse(expression, mode="eval").body)
    except SyntaxError as error:
        raise GrammarError(f"the grammar's expression {expression!r} is damaged") from error


class Narrator:
    """Tells what happens in a world by a grammar."""

    def __init__(self, grammar: Grammar, world: World, entities: Mapping[str, Entity]):
        self._grammar = grammar
        self._world = world
        self._entities = entities
        self._sorted: dict[str, list] = {}

    def derive(self, rule: str, mapping: Mapping_, facts: Facts) -> str:
        """The text of a rule.

        Raises:
            GrammarError: the grammar has no such rule, or no production of it applies.
        """
        return "".join(self._rule(rule, dict(mapping), facts))

    def command(self, action: str, mapping: Mapping_, facts: Facts) -> str:
        """The command for an action."""
        template = self._grammar.templates[action]
        return "".join(self._expand(template, dict(mapping), facts))

    def feedback(self, action: str, mapping: Mapping_, facts: Facts) -> str:
        """What is told after an action, with the facts after it."""
        return self.derive(self._grammar.feedback[action], mapping, facts)

    def _rule(self, name: str, mapping: dict, facts: Facts) -> Iterator[str]:
        productions = self._grammar.rules.get(name)
        if productions is None:
            raise GrammarError(f"the grammar has no rule {name!r}")
        for production in productions:
            condition = production.condition
            if condition is None or next(self._answers(condition, mapping, facts), None) is not None:
                return self._expand(production.symbols, mapping, facts)
        raise GrammarError(f"no production of the grammar's rule {name!r} applies")

    def _expand(
        self, symbols: tuple[Symbol, ...], mapping: dict, facts: Facts
    ) -> Iterator[str]:
        for symbol in symbols:
            if symbol.kind == "text":
                yield symbol.content
            elif symbol.query is None and not symbol.is_list:
                yield from self._piece(symbol, mapping, facts)
            else:
                answers = [mapping] if symbol.query is None else [
                    mapping | answer for answer in self._answers(symbol.query, mapping, facts)
                ]
                yield from self._listed(symbol, answers, mapping, facts)

    def _listed(
        self, symbol: Symbol, answers: list[dict], mapping: dict, facts: Facts
    ) -> Iterator[str]:
        if symbol.is_list and not answers:
            yield from self._rule("list_empty", mapping, facts)
        for number, answer in enumerate(answers):
            if symbol.is_list and number:
                last = number == len(answers) - 1
                separator = "list_last_separator" if last else "list_separator"
                yield from self._rule(separator, mapping, facts)
            yield from self._piece(symbol, answer, facts)

    def _piece(self, symbol: Symbol, mapping: dict, facts: Facts) -> Iterator[str]:
        if symbol.kind == "rule":
            yield from self._rule(symbol.content, mapping, facts)
        else:
            yield symbol.content({name: self._entities[o] for (name, _), o in mapping.items()})

    def _answers(self, query: Query, mapping: dict, facts: Facts) -> Iterator[dict]:
        return self._match(query.atoms, 0, dict(mapping), facts)

    def _match(self, atoms: tuple, depth: int, mapping: dict, facts: Facts) -> Iterator[dict]:
        if depth == len(atoms):
            yield dict(mapping)
            return
        predicate, placeholders = atoms[depth]
        given = [mapping.get(placeholder) for placeholder in placeholders]
        if None not in given:
            if self._world.holds(facts, predicate, tuple(given)):
                yield from self._match(atoms, depth + 1, mapping, facts)
            return
        types = self._world.types
        for args in self._in_order(predicate, given, facts):
            bound = []
            for placeholder, arg in zip(placeholders, args, strict=True):
                known = mapping.get(placeholder)
                if known is None:
                    if types[arg] != placeholder[1] or arg in mapping.values():
                        break
                    mapping[placeholder] = arg
                    bound.append(placeholder)
                elif known != arg:
                    break
            else:
                yield from self._match(atoms, depth + 1, mapping, facts)
            for placeholder in bound:
                del mapping[placeholder]

    def _in_order(self, predicate: str, given: list, facts: Facts) -> list:
        """Tuples that may match, sorted; those of a static predicate are sorted once."""
        if predicate not in self._world.static:
            rows = self._world.matching(facts, predicate, given)
            if given[-1] is not None and len(given) == 2:
                rows = [row for row in rows if row[1] == given[1]]
            return sorted(rows)
        if any(arg is not None for arg in given):
            return self._world.matching(facts, predicate, given)  # Its index is sorted.
        if predicate not in self._sorted:
            self._sorted[predicate] = sorted(self._world.static[predicate])
        return self._sorted[predicate]
