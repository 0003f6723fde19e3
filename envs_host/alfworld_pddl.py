"""PDDL as ALFWorld's games use it: a domain compiled once, worlds whose states are plain sets.

The engine under ALFWorld (Fast Downward) translates every game to propositional form, twice, and
lists all applicable operators through C strings after every step. Here the lifted actions are
matched against the facts directly. What Fast Downward's translation does to the *meaning* is kept:

- names are lower case; disjunctions and existential quantifiers in a condition make variants of an
  action, and variants with the same name and arguments are one action;
- an effect that only restores what the condition demands is none, and an action without effects
  does not exist (going to where one already is: "Nothing happens.");
- an action deletes before it adds.

Supported: `and`, `or`, `not`, `exists`, `=` in conditions, `when` in effects; enough for
ALFWorld's domain (alfworld/data/alfred.pddl), which every game file carries a copy of. Anything
else is an error.
"""

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

_TOKEN = re.compile(r"[()]|[^\s()]+")
_COMMENT = re.compile(r";[^\n]*")

Args = tuple[str, ...]
# Predicate -> tuples of objects it is true for. Never changed in place: states share them.
Facts = dict[str, frozenset[Args]]


class PddlError(ValueError):
    """A text is not PDDL, or uses what is not supported."""


class Literal(NamedTuple):
    """`predicate(args)` or its negation; "=" is a predicate, too."""

    positive: bool
    predicate: str
    args: Args


class Effect(NamedTuple):
    """What an action makes true or false, if `condition` (a DNF) holds before it."""

    positive: bool
    predicate: str
    args: Args
    condition: tuple[tuple[Literal, ...], ...] | None


class Variant(NamedTuple):
    """One conjunction of an action's condition; its variables include quantified ones."""

    types: dict[str, str]
    literals: tuple[Literal, ...]


class Action(NamedTuple):
    """A lifted action; `parameters` are (name, type) pairs, names without "?"."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    variants: tuple[Variant, ...]
    effects: tuple[Effect, ...]


class Domain(NamedTuple):
    """`read` and `changed` are the predicates in conditions and in effects."""

    actions: dict[str, Action]
    read: frozenset[str]
    changed: frozenset[str]


class Ground(NamedTuple):
    """An action with its arguments, applicable where it was found."""

    action: Action
    args: Args
    adds: tuple[tuple[str, Args], ...]
    deletes: tuple[tuple[str, Args], ...]


def parse_domain(text: str) -> Domain:
    """Compiles a domain.

    Raises:
        PddlError: it is damaged or uses what is not supported.
    """
    actions = {}
    for section in _document(text):
        if section[0] == ":action":
            action = _action(section)
            actions[action.name] = action
    if not actions:
        raise PddlError("the PDDL domain has no actions")
    read, changed = set(), set()
    for action in actions.values():
        for variant in action.variants:
            read |= {literal.predicate for literal in variant.literals}
        for effect in action.effects:
            changed.add(effect.predicate)
            for conjunction in effect.condition or ():
                read |= {literal.predicate for literal in conjunction}
    return Domain(actions, frozenset(read - {"="}), frozenset(changed))


class Problem(NamedTuple):
    """Objects with their types, what is true at first, and the goal as variants."""

    types: dict[str, str]
    init: dict[str, set[Args]]
    goal: tuple[Variant, ...]


def parse_problem(text: str) -> Problem:
    """Reads a problem; costs and distances are left out.

    Raises:
        PddlError: it is damaged or has no objects, facts or goal.
    """
    types: dict[str, str] | None = None
    init: dict[str, set[Args]] = {}
    goal = None
    for section in _document(text):
        if section[0] == ":objects":
            types = dict(_typed(section[1:]))
        elif section[0] == ":init":
            for fact in section[1:]:
                if isinstance(fact, list) and fact and fact[0] != "=":
                    init.setdefault(fact[0], set()).add(tuple(fact[1:]))
        elif section[0] == ":goal":
            goal = tuple(_variants(section[1], {}))
    if types is None or not init or goal is None:
        raise PddlError("the PDDL problem lacks its objects, its initial facts or its goal")
    unknown = {arg for facts in init.values() for fact in facts for arg in fact} - set(types)
    if unknown:
        raise PddlError(f"the PDDL problem's facts name unknown objects, e.g. {min(unknown)!r}")
    return Problem(types, init, goal)


class World:
    """A domain and a problem, ready to be played.

    Attributes:
        initial: facts that can change, at the start. Beside the domain's predicates there may be
            "not_p" for those named in `negations`: what has been deleted and is not true again.
    """

    def __init__(
        self, domain: Domain, problem: Problem, *, keep: Iterable[str], negations: Iterable[str]
    ):
        """Args: keep, predicates that are asked for beside conditions and goal; negations, those
        whose deletion is kept as a fact "not_p" (as TextWorld does for all)."""
        self.types = problem.types
        self._negations = frozenset(negations)
        self._domain = domain
        goal_reads = {literal.predicate for v in problem.goal for literal in v.literals}
        kept = (domain.read | set(keep) | goal_reads | self._negations) - {"="}
        facts = {p: frozenset(problem.init.get(p, ())) for p in kept}
        self.static: Facts = {p: s for p, s in facts.items() if p not in domain.changed}
        self.initial: Facts = {p: s for p, s in facts.items() if p in domain.changed}
        self.initial |= {"not_" + p: frozenset() for p in self._negations}
        self._by_position: dict[tuple[str, int], dict[str, list[Args]]] = {}
        for predicate, tuples in self.static.items():
            for args in sorted(tuples):
                for position, arg in enumerate(args):
                    index = self._by_position.setdefault((predicate, position), {})
                    index.setdefault(arg, []).append(args)
        self._objects: dict[str, list[str]] = {}
        for name, type_ in problem.types.items():
            self._objects.setdefault(type_, []).append(name)
        self._plans = [
            (action, [self._plan(variant) for variant in action.variants])
            for action in domain.actions.values()
        ]
        self._goal = [self._plan(variant) for variant in problem.goal]

    def holds(self, facts: Facts, predicate: str, args: Args) -> bool:
        """Whether a fact is true."""
        known = self.static.get(predicate)
        return args in (facts.get(predicate, ()) if known is None else known)

    def tuples(self, facts: Facts, predicate: str) -> frozenset[Args]:
        """Everything a predicate is true for."""
        known = self.static.get(predicate)
        return facts.get(predicate, frozenset()) if known is None else known

    def matching(self, facts: Facts, predicate: str, args: list[str | None]) -> Iterable[Args]:
        """Tuples that agree with `args` at least at its first given place; None is open."""
        if predicate in self.static:
            for position, arg in enumerate(args):
                if arg is not None:
                    return self._by_position.get((predicate, position), {}).get(arg, ())
            return self.static[predicate]
        return facts.get(predicate, ())

    def applicable(self, facts: Facts) -> Iterator[Ground]:
        """Every action that can be done, each once."""
        for action, plans in self._plans:
            found = set()
            for variant, plan in plans:
                for binding in self._solve(plan, 0, {}, facts):
                    args = tuple(binding[name] for name, _ in action.parameters)
                    if args not in found:
                        ground = self._ground(action, variant, args, binding, facts)
                        if ground is not None:
                            found.add(args)
                            yield ground

    def apply(self, facts: Facts, ground: Ground) -> Facts:
        """The facts after an action."""
        changed: dict[str, set[Args]] = {}

        def change(predicate: str) -> set[Args] | None:
            if predicate not in facts:
                return None  # Nothing ever asks for it.
            if predicate not in changed:
                changed[predicate] = set(facts[predicate])
            return changed[predicate]

        for predicate, args in ground.deletes:
            if (facts_of := change(predicate)) is not None:
                facts_of.discard(args)
            if predicate in self._negations:
                change("not_" + predicate).add(args)
        for predicate, args in ground.adds:
            if (facts_of := change(predicate)) is not None:
                facts_of.add(args)
            if predicate in self._negations:
                change("not_" + predicate).discard(args)
        return facts | {predicate: frozenset(tuples) for predicate, tuples in changed.items()}

    def reached(self, facts: Facts) -> bool:
        """Whether the goal holds."""
        return any(
            next(self._solve(plan, 0, {}, facts), None) is not None for _, plan in self._goal
        )

    def _ground(
        self, action: Action, variant: Variant, args: Args, binding: dict[str, str], facts: Facts
    ) -> Ground | None:
        adds, deletes = [], []
        for effect in action.effects:
            if effect.condition is not None and not any(
                all(self._true(literal, binding, facts) for literal in conjunction)
                for conjunction in effect.condition
            ):
                continue
            where = adds if effect.positive else deletes
            where.append((effect.predicate, tuple(binding.get(arg, arg) for arg in effect.args)))
        deletes = [fact for fact in deletes if fact not in adds]
        demanded = {
            (literal.positive, literal.predicate, tuple(binding.get(arg, arg) for arg in literal.args))
            for literal in variant.literals
        }
        adds = [fact for fact in adds if (True, *fact) not in demanded]
        deletes = [fact for fact in deletes if (False, *fact) not in demanded]
        if not adds and not deletes:
            return None
        return Ground(action, args, tuple(adds), tuple(deletes))

    def _true(self, literal: Literal, binding: Mapping[str, str], facts: Facts) -> bool:
        args = tuple(binding.get(arg, arg) for arg in literal.args)
        if literal.predicate == "=":
            return (args[0] == args[1]) == literal.positive
        return self.holds(facts, literal.predicate, args) == literal.positive

    def _plan(self, variant: Variant) -> tuple[Variant, tuple]:
        """In which order to look the literals up, fewest answers first."""
        left, plan = list(variant.literals), []
        # What is no variable is a constant.
        known = {arg for lit in left for arg in lit.args if arg not in variant.types}

        def size(literal: Literal) -> float:
            rows = len(self.static.get(literal.predicate, self.initial.get(literal.predicate, ())))
            opened = sum(arg not in known for arg in literal.args)
            if not opened:
                return 0.0
            return (rows + 1) * (0.1 if opened < len(literal.args) else 1.0)

        while left:
            ready = [
                lit for lit in left
                if all(arg in known for arg in lit.args)
                or (lit.positive and lit.predicate != "=")
            ]
            if not ready:  # Only variables that nothing positive binds are left.
                free = next(arg for lit in left for arg in lit.args if arg not in known)
                plan.append((None, free))
                known.add(free)
                continue
            chosen = min(ready, key=size)
            left.remove(chosen)
            plan.append((chosen, None))
            known |= set(chosen.args)
        plan += [(None, name) for name in variant.types if name not in known]
        return variant, tuple((literal, free, variant.types) for literal, free in plan)

    def _solve(
        self, plan: tuple, depth: int, binding: dict[str, str], facts: Facts
    ) -> Iterator[dict[str, str]]:
        """Bindings that make all literals of a plan true; each is valid until the next is asked."""
        if depth == len(plan):
            yield binding
            return
        literal, free, types = plan[depth]
        if literal is None:
            for name in self._objects.get(types[free], ()):
                binding[free] = name
                yield from self._solve(plan, depth + 1, binding, facts)
            binding.pop(free, None)
            return
        values = [binding.get(arg) if arg in types else arg for arg in literal.args]
        if None not in values:
            args = tuple(values)
            if literal.predicate == "=":
                true = args[0] == args[1]
            else:
                true = self.holds(facts, literal.predicate, args)
            if true == literal.positive:
                yield from self._solve(plan, depth + 1, binding, facts)
            return
        for args in self.matching(facts, literal.predicate, values):
            bound = []
            for variable, value, arg in zip(literal.args, values, args, strict=True):
                if value is None and variable not in binding:
                    if self.types[arg] != types[variable]:
                        break
                    binding[variable] = arg
                    bound.append(variable)
                elif (value or binding[variable]) != arg:
                    break
            else:
                yield from self._solve(plan, depth + 1, binding, facts)
            for variable in bound:
                del binding[variable]


def _document(text: str) -> list[list]:
    """The sections of `(define ...)`, in lower case."""
    stack: list[list] = [[]]
    for token in _TOKEN.findall(_COMMENT.sub("", text).lower()):
        if token == "(":
            stack.append([])
        elif token != ")":
            stack[-1].append(token)
        elif len(stack) > 1:
            done = stack.pop()
            stack[-1].append(done)
        else:
            raise PddlError("the PDDL text closes a parenthesis that was not opened")
    if len(stack) > 1 or len(stack[0]) != 1 or not stack[0][0] or stack[0][0][0] != "define":
        raise PddlError("the PDDL text is not one complete (define ...): it is cut short or damaged")
    return [section for section in stack[0][0][1:] if isinstance(section, list) and section]


def _typed(items: list) -> Iterator[tuple[str, str]]:
    """Reads `a b - t c - u`; the "?" of a name is dropped.

    ALFWorld's domain has `?l - location, ?r - receptacle` once, which Fast Downward takes for a type
    "location," without objects: what lies about cannot be examined, only what is held.
    """
    waiting: list[str] = []
    tokens = iter(items)
    for item in tokens:
        if item == "-":
            type_ = next(tokens, None)
            if type_ is None:
                raise PddlError("a PDDL list of names ends in '-' without a type")
            yield from ((name, type_) for name in waiting)
            waiting = []
        else:
            waiting.append(item.lstrip("?"))
    yield from ((name, "object") for name in waiting)


def _action(section: list) -> Action:
    parts: dict[str, Any] = dict(zip(section[2::2], section[3::2], strict=False))
    parameters = tuple(_typed(parts.get(":parameters", [])))
    variants = tuple(_variants(parts.get(":precondition", []), dict(parameters)))
    return Action(section[1], parameters, variants, tuple(_effects(parts.get(":effect", []), None)))


def _variants(condition: Any, types: dict[str, str]) -> Iterator[Variant]:
    for extra, literals in _dnf(condition):
        # The translation of a condition makes one literal of two equal ones.
        yield Variant(types | extra, tuple(dict.fromkeys(literals)))


def _dnf(condition: Any) -> list[tuple[dict[str, str], tuple[Literal, ...]]]:
    """Disjuncts of a condition: (types of the quantified variables, conjunction)."""
    if not condition:
        return [({}, ())]
    head, rest = condition[0], condition[1:]
    if head == "and":
        made: list[tuple[dict[str, str], tuple[Literal, ...]]] = [({}, ())]
        for part in rest:
            made = [
                _both(one, two) for one, two in itertools.product(made, _dnf(part))
            ]
        return made
    if head == "or":
        return [disjunct for part in rest for disjunct in _dnf(part)]
    if head == "exists":
        types = dict(_typed(rest[0]))
        return [(types | extra, literals) for extra, literals in _dnf(rest[1])]
    if head == "not":
        inner = rest[0]
        if inner[0] in ("and", "or", "exists", "forall", "not", "imply"):
            raise PddlError(f"PDDL 'not ({inner[0]} ...)' is not supported")
        return [({}, (_literal(inner, positive=False),))]
    if head in ("forall", "imply", "when"):
        raise PddlError(f"PDDL {head!r} in a condition is not supported")
    return [({}, (_literal(condition, positive=True),))]


def _both(one, two):
    """Two disjuncts joined; a variable quantified twice under one name is renamed."""
    (types, literals), (other_types, other_literals) = one, two
    clash = {
        name: f"{name}'{len(types)}" for name in other_types if name in types
    }
    if clash:
        other_types = {clash.get(name, name): type_ for name, type_ in other_types.items()}
        other_literals = tuple(
            Literal(lit.positive, lit.predicate, tuple(clash.get(a, a) for a in lit.args))
            for lit in other_literals
        )
    return types | other_types, literals + other_literals


def _literal(atom: list, positive: bool) -> Literal:
    if not all(isinstance(part, str) for part in atom):
        raise PddlError(f"{atom!r} is not a PDDL atom")
    return Literal(positive, atom[0], tuple(part.lstrip("?") for part in atom[1:]))


def _effects(effect: Any, condition: Any) -> Iterator[Effect]:
    if not effect or effect[0] == "increase":
        return
    head = effect[0]
    if head == "and":
        for part in effect[1:]:
            yield from _effects(part, condition)
    elif head == "when":
        if condition is not None:
            raise PddlError("PDDL 'when' within 'when' is not supported")
        disjuncts = _dnf(effect[1])
        if any(types for types, _ in disjuncts):
            raise PddlError("PDDL 'exists' in the condition of an effect is not supported")
        yield from _effects(effect[2], tuple(literals for _, literals in disjuncts))
    elif head in ("forall", "or", "exists"):
        raise PddlError(f"PDDL {head!r} in an effect is not supported")
    else:
        negative = head == "not"
        literal = _literal(effect[1] if negative else effect, positive=not negative)
        yield Effect(literal.positive, literal.predicate, literal.args, condition)
