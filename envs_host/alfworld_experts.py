"""Two experts for ALFWorld's six task types: one that knows everything, one that has to look.

`plan` is the shortest way from any state, by trying every choice that matters (which object, which
receptacle, which sink): the six goals are too alike to need a general planner, which takes up to
37 s for the largest kitchens and must then be killed. Its length from every state also gives the
progress signal. `explore` searches like a stranger: it knows the receptacles, which the opening
lists, and what it has seen; its demonstrations can be imitated from the text, whereas `plan` walks
straight to what it cannot have seen.
"""

import itertools
import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from envs_host.alfworld_engine import Engine
from envs_host.alfworld_pddl import Facts, Variant

# State an object must be in -> (the action that brings it about, type of the receptacle for it).
_TREATMENTS = {
    "isclean": ("cleanobject", "sinkbasintype"),
    "ishot": ("heatobject", "microwavetype"),
    "iscool": ("coolobject", "fridgetype"),
}


class Goal(NamedTuple):
    """What a task demands.

    Attributes:
        kind: type of the objects, e.g. "mugtype".
        count: how many of them.
        state: "isclean", "ishot", "iscool" or None.
        place: type of the receptacle that they must be in; None: one must be held.
        lamp: type of what must be switched on beside the player; None without.
    """

    kind: str
    count: int
    state: str | None
    place: str | None
    lamp: str | None


def goal(variants: tuple[Variant, ...]) -> Goal | None:
    """Reads the goal of a problem; None if it is of none of the six kinds."""
    if len(variants) != 1:
        return None
    types: dict[str, str] = {}
    places: dict[str, str] = {}
    inside: dict[str, str] = {}
    states: dict[str, str] = {}
    held, toggled = [], []
    for positive, predicate, args in variants[0].literals:
        if not positive:
            continue  # "=" between the two objects of pick_two.
        if predicate == "objecttype":
            types[args[0]] = args[1]
        elif predicate == "receptacletype":
            places[args[0]] = args[1]
        elif predicate == "inreceptacle":
            inside[args[0]] = args[1]
        elif predicate in _TREATMENTS:
            states[args[0]] = predicate
        elif predicate == "istoggled":
            toggled.append(args[0])
        elif predicate == "holds":
            held.append(args[1])
    if toggled and held:
        return Goal(types[held[0]], 1, states.get(held[0]), None, types[toggled[0]])
    wanted = [o for o, r in inside.items() if r in places and o in types]
    kinds = {types[o] for o in wanted}
    if len(kinds) != 1 or len({inside[o] for o in wanted}) != 1:
        return None
    state = next((states[o] for o in wanted if o in states), None)
    return Goal(kinds.pop(), len(wanted), state, places[inside[wanted[0]]], None)


class _Place:
    """A house in some state, and the player's way through it."""

    def __init__(self, engine: Engine, facts: Facts):
        world = engine.world
        self.engine, self.world = engine, world
        self.location = dict(world.tuples(facts, "receptacleatlocation"))
        self.kind = dict(world.tuples(facts, "receptacletype"))
        self.openable = {r for (r,) in world.tuples(facts, "openable")}
        self.object_kind = dict(world.tuples(facts, "objecttype"))
        self.fits = world.tuples(facts, "cancontain")
        self.pickupable = {o for (o,) in world.tuples(facts, "pickupable")}
        self.state = {
            (s, o) for s in _TREATMENTS for (o,) in world.tuples(facts, s)
        } | {("toggled", o) for (o,) in world.tuples(facts, "istoggled")}
        self.at = next((where for _, where in world.tuples(facts, "atlocation")), None)
        self.held = next((o for _, o in world.tuples(facts, "holds")), None)
        self.opened = {r for (r,) in world.tuples(facts, "opened")}
        self.inside = dict(world.tuples(facts, "inreceptacle"))
        self.steps: list[tuple[str, dict[tuple[str, str], str]]] = []

    def copy(self) -> "_Place":
        twin = object.__new__(_Place)
        vars(twin).update(vars(self))
        twin.opened, twin.inside = set(self.opened), dict(self.inside)
        twin.state, twin.steps = set(self.state), list(self.steps)
        return twin

    def receptacles(self, kind: str) -> list[str]:
        return sorted(r for r, k in self.kind.items() if k == kind and r in self.location)

    def objects(self, kind: str) -> list[str]:
        return sorted(o for o, k in self.object_kind.items() if k == kind)

    def can_hold(self, receptacle: str, thing: str) -> bool:
        return (self.kind.get(receptacle), self.object_kind.get(thing)) in self.fits

    def do(self, action: str, **roles: str) -> None:
        types = {"lend": "location", "r": "receptacle", "o": "object"}
        self.steps.append((action, {(name, types[name]): o for name, o in roles.items()}))

    def go(self, receptacle: str) -> bool:
        """Returns whether a step was needed."""
        if self.at == self.location[receptacle]:
            return False
        self.at = self.location[receptacle]
        self.do("gotolocation", lend=self.at, r=receptacle)
        return True

    def reach(self, receptacle: str) -> None:
        self.go(receptacle)
        if receptacle in self.openable and receptacle not in self.opened:
            self.opened.add(receptacle)
            self.do("openobject", r=receptacle)

    def take(self, thing: str) -> None:
        receptacle = self.inside.pop(thing)
        self.reach(receptacle)
        self.held = thing
        self.do("pickupobject", o=thing, r=receptacle)

    def put(self, receptacle: str) -> None:
        self.reach(receptacle)
        self.inside[self.held] = receptacle
        self.do("putobject", o=self.held, r=receptacle)
        self.held = None

    def treat(self, state: str, receptacle: str) -> None:
        action, _ = _TREATMENTS[state]
        self.go(receptacle)
        self.do(action, o=self.held, r=receptacle)
        self.state.add((state, self.held))

    def use(self, lamp: str) -> None:
        self.go(self.inside[lamp])
        if ("toggled", lamp) not in self.state:
            self.state.add(("toggled", lamp))
            self.do("toggleobject", o=lamp)

    def commands(self) -> list[str]:
        return [self.engine.command(action, roles) for action, roles in self.steps]


def plan(engine: Engine, facts: Facts, wanted: Goal) -> list[str] | None:
    """The shortest list of commands that reaches the goal; None if there is none.

    Args:
        engine: the game.
        facts: any state of it.
        wanted: what `goal` read.
    """
    best = _shortest(engine, facts, wanted)
    return None if best is None else best.commands()


def distance(engine: Engine, facts: Facts, wanted: Goal) -> int | None:
    """How many commands `plan` takes."""
    best = _shortest(engine, facts, wanted)
    return None if best is None else len(best.steps)


def _shortest(engine: Engine, facts: Facts, wanted: Goal) -> _Place | None:
    start = _Place(engine, facts)
    ways = _lit(start, wanted) if wanted.place is None else _placed(start, wanted)
    return min(ways, key=lambda way: len(way.steps), default=None)


def _lit(start: _Place, wanted: Goal) -> Iterator[_Place]:
    lamps = [lamp for lamp in start.objects(wanted.lamp) if lamp in start.inside]
    for lamp, thing in itertools.product(lamps, start.objects(wanted.kind)):
        for way in _held(start, thing):
            way.use(lamp)
            yield way


def _placed(start: _Place, wanted: Goal) -> Iterator[_Place]:
    things = start.objects(wanted.kind)
    for receptacle in start.receptacles(wanted.place):
        done = {
            o for o in things
            if start.inside.get(o) == receptacle
            and (wanted.state is None or (wanted.state, o) in start.state)
        }
        left = wanted.count - len(done)
        if left <= 0:
            yield start.copy()
            return
        for chosen in itertools.permutations([o for o in things if o not in done], left):
            yield from _all_placed(start, chosen, receptacle, wanted.state)


def _all_placed(
    start: _Place, things: tuple[str, ...], receptacle: str, state: str | None
) -> Iterator[_Place]:
    if not things:
        yield start
        return
    for way in _treated(start, things[0], state):
        if way.can_hold(receptacle, things[0]):
            way.put(receptacle)
            yield from _all_placed(way, things[1:], receptacle, state)


def _treated(start: _Place, thing: str, state: str | None) -> Iterator[_Place]:
    for way in _held(start, thing):
        if state is None or (state, thing) in way.state:
            yield way
            continue
        for receptacle in way.receptacles(_TREATMENTS[state][1]):
            treated = way.copy()
            treated.treat(state, receptacle)
            yield treated


def _held(start: _Place, thing: str) -> Iterator[_Place]:
    """Ways to have `thing` in hand."""
    if start.held == thing:
        yield start.copy()
        return
    if thing not in start.inside or thing not in start.pickupable:
        return
    if start.held is None:
        way = start.copy()
        way.take(thing)
        yield way
        return
    # Hands are full: put it down here, where the thing is, or at the first place that is open.
    fitting = [r for r in sorted(start.location) if start.can_hold(r, start.held)]
    here = [r for r in fitting if start.location[r] == start.at]
    there = [r for r in fitting if start.location[r] == start.location[start.inside[thing]]]
    anywhere = [r for r in fitting if r not in start.openable] or fitting
    for receptacle in dict.fromkeys([*here, *there, *anywhere[:1]]):
        way = start.copy()
        way.put(receptacle)
        way.take(thing)
        yield way


def explore(engine: Engine, wanted: Goal, seed: int) -> list[str] | None:
    """Commands of somebody who looks until it is found; None if it is not.

    Args:
        engine: the game, played from its opening.
        wanted: what `goal` read.
        seed: of the order in which receptacles are looked into; those that may hold what is looked
            for come first.
    """
    place = _Place(engine, engine.opening.facts)
    rng = random.Random(seed)
    order = sorted(place.location)
    rng.shuffle(order)
    likely = {r for r in order if (place.kind.get(r), wanted.kind) in place.fits}
    order.sort(key=lambda r: r not in likely)
    seen: set[str] = set()

    def find(good: Callable[[str], bool]) -> str | None:
        """Looks until something good is seen; returns it."""
        while True:
            visible = sorted(o for o, r in place.inside.items() if r in seen and good(o))
            if visible:
                return visible[0]
            receptacle = next((r for r in order if r not in seen), None)
            if receptacle is None:
                return None
            seen.add(receptacle)
            told = place.go(receptacle)
            if receptacle in place.openable and receptacle not in place.opened:
                place.reach(receptacle)
            elif not told:
                place.do("examinereceptacle", r=receptacle)

    target = None
    if wanted.place is not None:
        targets = place.receptacles(wanted.place)
        if not targets:
            return None
        target = rng.choice(targets)
    for _ in range(wanted.count):
        thing = find(
            lambda o: place.object_kind.get(o) == wanted.kind
            and o in place.pickupable
            and place.inside[o] != target
        )
        if thing is None:
            return None
        place.take(thing)
        if wanted.state is not None:
            appliances = place.receptacles(_TREATMENTS[wanted.state][1])
            if not appliances:
                return None
            place.treat(wanted.state, appliances[0])
        if target is not None:
            place.put(target)
    if wanted.lamp is not None:
        lamp = find(lambda o: place.object_kind.get(o) == wanted.lamp)
        if lamp is None:
            return None
        place.use(lamp)
    return place.commands()
