"""New ALFWorld houses by seed: a room of the wheel's floor plans, furnished for one task.

The `alfworld` wheel ships, for its 120 rooms, where the receptacles stand
(gen/layouts/*-openable.json) and which kinds of objects there are (*-objects.json), what fits
where and what can be heated, cooled and cleaned (gen/constants.py), and goals with their sentences
(gen/goal_library.py). These are read as data; of the library's code only the two files of
constants are executed.

Splits are by room, as in the original: "train" and "valid_seen" take the same rooms (with other
seeds), "valid_unseen" the rooms that the wheel lists as test scenes.
"""

import functools
import importlib.util
import json
import os
import random
import runpy
from typing import Any, NamedTuple

from envs_host.specs import TASK_TYPES, SetAside, Spec

# Furniture that object lists name but for which no floor plan has a position; how many there are.
_FIXTURES = {"StoveBurner": 4, "CoffeeMachine": 1, "Toaster": 1, "GarbageCan": 1, "TowelHolder": 1,
             "HandTowelHolder": 2, "ToiletPaperHanger": 1, "LaundryHamper": 1, "Cart": 1}
_LAMPS = ("DeskLamp", "FloorLamp")
# Where a lamp may stand, the first ones by preference.
_LAMP_PLACES = ("Desk", "SideTable", "Dresser", "CoffeeTable", "DiningTable", "Shelf", "TVStand",
                "CounterTop", "Sofa", "ArmChair", "Bed")
_APPLIANCES = {
    "pick_clean_then_place_in_recep": ("Cleanable", "SinkBasin"),
    "pick_heat_then_place_in_recep": ("Heatable", "Microwave"),
    "pick_cool_then_place_in_recep": ("Coolable", "Fridge"),
}
_MAX_COPIES = 3  # Of one kind of object in a room, as in the original (MAX_NUM_OF_OBJ_INSTANCES).
_MANGLED = (("|", "_bar_"), ("-", "_minus_"), ("+", "_plus_"), (".", "_dot_"), (",", "_comma_"))


class Library(NamedTuple):
    """What the wheel ships."""

    domain: str
    grammar: str
    constants: dict[str, Any]
    goals: dict[str, Any]
    rooms: dict[int, "Room"]


class Room(NamedTuple):
    """A floor plan: receptacle id -> (type, where the player stands for it), and object types."""

    scene: int
    kind: str
    receptacles: dict[str, tuple[str, tuple[float, ...]]]
    objects: tuple[str, ...]


class House(NamedTuple):
    """A game to be: its file's parts and its `traj_data`, as the official set describes a game."""

    game: dict[str, Any]
    traj_data: dict[str, Any]


@functools.cache
def library() -> Library:
    """Reads the wheel.

    Raises:
        ValueError: `alfworld` is not installed.
    """
    found = importlib.util.find_spec("alfworld")  # Found, not imported: that would make folders.
    if found is None or not found.submodule_search_locations:
        raise ValueError(
            "ALFWorld houses are made from the files of the alfworld library: run "
            "pip install 'jaxagentrl[alfworld]' (from a checkout: pip install -e '.[alfworld]')."
        )
    folder = found.submodule_search_locations[0]

    def text(*names: str) -> str:
        with open(os.path.join(folder, *names), encoding="utf-8") as file:
            return file.read()

    constants = runpy.run_path(os.path.join(folder, "gen", "constants.py"))
    rooms = {}
    for kind, scenes in constants["SCENE_TYPE"].items():
        for scene in scenes:
            stem = os.path.join("gen", "layouts", f"FloorPlan{scene}-")
            positions = json.loads(text(stem + "openable.json"))
            receptacles = {
                id_: (_kind(id_), tuple(pose)) for id_, pose in sorted(positions.items())
            }
            objects = tuple(sorted(set(json.loads(text(stem + "objects.json")))))
            rooms[scene] = Room(scene, kind.lower(), receptacles, objects)
    goals = runpy.run_path(os.path.join(folder, "gen", "goal_library.py"))["gdict"]
    domain, grammar = text("data", "alfred.pddl"), text("data", "alfred.twl2")
    return Library(domain, grammar, constants, goals, rooms)


def _kind(id_: str) -> str:
    # "Sink|...|SinkBasin" is a basin: without this, nothing can be cleaned.
    return id_.rpartition("|")[2] if id_.endswith("Basin") else id_.partition("|")[0]


def furnish(spec: Spec) -> House:
    """Makes a house.

    Raises:
        SetAside: no room of the split supports the task, or what is asked for does not fit.
    """
    params = dict(spec.params)
    rng = random.Random(spec.seed)
    known = library()
    task_type = params["task_type"]
    if task_type == "any":
        task_type = rng.choice(TASK_TYPES)
    room = _room(params, task_type, rng)
    room = _with_fixtures(room, known.constants, rng)
    thing, place, lamp = _target(room, task_type, rng)
    receptacles = _choose_receptacles(room, task_type, thing, place, params["num_receptacles"], rng)
    objects = _choose_objects(
        room, receptacles, task_type, thing, place, lamp, params["num_objects"], rng)
    problem = _problem(spec, known, receptacles, objects, task_type, thing, place, lamp,
                       closed=params["closed"], rng=rng)
    templates = known.goals[task_type]["templates"]
    sentence = rng.choice(templates).format(
        obj=thing.lower(), recep=(place or "").lower(), toggle=(lamp or "").lower())
    game = {
        "pddl_domain": known.domain,
        "grammar": known.grammar.replace("UNKNOWN GOAL", sentence),
        "pddl_problem": problem,
    }
    traj_data = {
        "task_id": spec.name,
        "task_type": task_type,
        "scene": {"floor_plan": f"FloorPlan{room.scene}", "scene_num": room.scene},
        "pddl_params": {
            "mrecep_target": "",
            "object_sliced": False,
            "object_target": thing,
            "parent_target": place or "",
            "toggle_target": lamp or "",
        },
        "turk_annotations": {"anns": [{"task_desc": sentence}]},
    }
    return House(game, traj_data)


def scenes(split: str) -> list[int]:
    """Scene numbers of a split."""
    constants = library().constants
    name = "TEST_SCENE_NUMBERS" if split == "valid_unseen" else "TRAIN_SCENE_NUMBERS"
    return list(constants[name])


def _room(params: dict[str, Any], task_type: str, rng: random.Random) -> Room:
    known = library()
    allowed = {kind.lower() for kind in known.constants["GOALS_VALID"][task_type]}
    rooms = [known.rooms[scene] for scene in scenes(params["split"])]
    if params["room"] != "any":
        rooms = [room for room in rooms if room.kind == params["room"]]
    if params["scene"] is not None:
        rooms = [room for room in rooms if room.scene == params["scene"]]
    rooms = [room for room in rooms if room.kind in allowed]
    # The lamp of an old plan is of no known kind ("Lamp").
    rooms = [r for r in rooms if task_type != TASK_TYPES[1] or set(_LAMPS) & set(r.objects)]
    rooms = [r for r in rooms if next(_targets(r, task_type), None) is not None]
    if not rooms:
        raise SetAside(
            f"no room of split {params['split']} with room={params['room']}, "
            f"scene={params['scene']} supports {task_type}"
        )
    return rng.choice(rooms)


def _with_fixtures(room: Room, constants: dict[str, Any], rng: random.Random) -> Room:
    """Adds the furniture that the plan names but does not place, each at a position of its own."""
    receptacles = dict(room.receptacles)
    placed = {kind for kind, _ in receptacles.values()}
    number = 0
    for kind, count in _FIXTURES.items():
        if kind in room.objects and kind not in placed and kind in constants["RECEPTACLES"]:
            for _ in range(count):
                number += 1
                id_ = f"{kind}|{_coordinate(rng)}|{_coordinate(rng)}|{_coordinate(rng)}"
                receptacles[id_] = (kind, (float(number), 99.0, 0.0, 0.0))
    return room._replace(receptacles=receptacles)


def _targets(room: Room, task_type: str):
    """(object, receptacle, lamp) that the task may be about in a room, in a fixed order."""
    constants = library().constants
    fits = constants["VAL_RECEPTACLE_OBJECTS"]
    kinds = {kind for kind, _ in room.receptacles.values()}
    things = [
        thing for thing in room.objects
        if any(thing in fits.get(kind, ()) for kind in kinds)
    ]
    if task_type == TASK_TYPES[1]:
        lamps = [lamp for lamp in _LAMPS if lamp in room.objects]
        if kinds & set(_LAMP_PLACES):
            yield from ((thing, None, lamp) for thing in things for lamp in lamps)
        return
    treatment, appliance = _APPLIANCES.get(task_type, (None, None))
    if appliance is not None and appliance not in kinds:
        return
    for thing in things:
        if treatment is not None and thing not in constants["VAL_ACTION_OBJECTS"][treatment]:
            continue
        for place in sorted(kinds - {appliance}):
            # It must be able to lie elsewhere at first.
            elsewhere = any(thing in fits.get(kind, ()) for kind in kinds - {place})
            if elsewhere and thing in fits.get(place, ()):
                yield thing, place, None


def _target(room: Room, task_type: str, rng: random.Random):
    choices = list(_targets(room, task_type))
    # First the object, then where to: else what fits everywhere would be asked for most.
    thing = rng.choice(sorted({choice[0] for choice in choices}))
    return rng.choice([choice for choice in choices if choice[0] == thing])


def _choose_receptacles(
    room: Room, task_type: str, thing: str, place: str | None, wanted: int | None,
    rng: random.Random,
) -> dict[str, tuple[str, tuple[float, ...]]]:
    """All of the plan's receptacles, or `wanted` of them, among which the task can be done."""
    if wanted is None or wanted >= len(room.receptacles):
        return room.receptacles
    fits = library().constants["VAL_RECEPTACLE_OBJECTS"]
    ids = sorted(room.receptacles)
    rng.shuffle(ids)

    def first(good) -> str:
        return next(id_ for id_ in ids if good(room.receptacles[id_][0]))

    needed = {first(lambda kind: kind != place and thing in fits.get(kind, ()))}
    if place is not None:
        needed.add(first(lambda kind: kind == place))
    if task_type in _APPLIANCES:
        needed.add(first(lambda kind: kind == _APPLIANCES[task_type][1]))
    if task_type == TASK_TYPES[1]:
        needed.add(first(lambda kind: kind in _LAMP_PLACES))
    if wanted < len(needed):
        raise SetAside(f"num_receptacles={wanted}: the task takes {len(needed)}")
    chosen = [*sorted(needed), *(id_ for id_ in ids if id_ not in needed)][:wanted]
    return {id_: room.receptacles[id_] for id_ in sorted(chosen)}


def _choose_objects(
    room: Room, receptacles: dict, task_type: str, thing: str, place: str | None,
    lamp: str | None, wanted: int | None, rng: random.Random,
) -> dict[str, tuple[str, str]]:
    """Object id -> (type, id of the receptacle it is in)."""
    constants = library().constants
    fits = constants["VAL_RECEPTACLE_OBJECTS"]
    made: dict[str, tuple[str, str]] = {}

    def place_one(kind: str, into: list[str]) -> None:
        id_ = f"{kind}|{_coordinate(rng)}|{_coordinate(rng)}|{_coordinate(rng)}"
        if id_ not in made:
            made[id_] = (kind, rng.choice(into))

    def places(kind: str, *, but: str | None = None) -> list[str]:
        return [
            id_ for id_, (type_, _) in receptacles.items()
            if kind in fits.get(type_, ()) and type_ != but
        ]

    least = 2 if task_type == TASK_TYPES[5] else 1
    homes = places(thing, but=place)
    if not homes:
        raise SetAside(f"there is no place for a {thing} but the one it must be put in")
    copies = rng.randint(least, _MAX_COPIES) if wanted is None else least
    for _ in range(copies):
        place_one(thing, homes)
    if lamp is not None:
        for type_ in _LAMP_PLACES:
            stands = [id_ for id_, (kind, _) in receptacles.items() if kind == type_]
            if stands:
                place_one(lamp, stands)
                break
    others = [kind for kind in room.objects if kind != thing and places(kind)]
    rng.shuffle(others)
    if wanted is None:
        for kind in others:
            for _ in range(rng.randint(1, _MAX_COPIES)):
                place_one(kind, places(kind))
    else:
        if wanted < len(made):
            raise SetAside(f"num_objects={wanted}: the task takes {len(made)}")
        for number in range((wanted - len(made)) if others else 0):
            kind = others[number % len(others)]
            place_one(kind, places(kind))
    return made


def _problem(
    spec: Spec, known: Library, receptacles: dict, objects: dict, task_type: str, thing: str,
    place: str | None, lamp: str | None, *, closed: bool, rng: random.Random,
) -> str:
    """The PDDL problem, in the form of the official games."""
    constants = known.constants
    fits, actions = constants["VAL_RECEPTACLE_OBJECTS"], constants["VAL_ACTION_OBJECTS"]
    static = sorted(set(constants["RECEPTACLES"]) - set(constants["MOVABLE_RECEPTACLES"]))
    receptacle_types = sorted({*static, *(kind for kind, _ in receptacles.values())})
    object_types = sorted({*fits_all(fits), *(kind for kind, _ in objects.values()), *_LAMPS})
    where = {id_: _location(pose) for id_, (_, pose) in receptacles.items()}
    start = f"loc|{rng.randint(-12, 12)}|{rng.randint(-12, 12)}|{rng.randint(0, 3)}|31"
    facts = [f"(atLocation agent1 {start})"]
    for id_, (kind, _) in receptacles.items():
        facts.append(f"(receptacleType {id_} {kind}Type)")
        facts.append(f"(receptacleAtLocation {id_} {where[id_]})")
        if kind in constants["OPENABLE_CLASS_SET"]:
            facts.append(f"(openable {id_})")
            if not closed:
                facts.append(f"(opened {id_})")
    for id_, (kind, receptacle) in objects.items():
        facts.append(f"(objectType {id_} {kind}Type)")
        facts.append(f"(inReceptacle {id_} {receptacle})")
        facts.append(f"(objectAtLocation {id_} {where[receptacle]})")
        if kind not in _LAMPS:
            facts.append(f"(pickupable {id_})")
        if kind in constants["MOVABLE_RECEPTACLES"]:
            facts.append(f"(isReceptacleObject {id_})")
        for action in ("Cleanable", "Heatable", "Coolable", "Toggleable", "Sliceable"):
            if kind in actions[action]:
                facts.append(f"({action.lower()} {id_})")
    facts += [
        f"(canContain {kind}Type {held}Type)"
        for kind in receptacle_types for held in sorted(fits.get(kind, ())) if held in object_types
    ]
    named = [
        "agent1 # agent",
        *(f"{id_} # object" for id_ in objects),
        *(f"{id_} # receptacle" for id_ in receptacles),
        *(f"{kind}Type # otype" for kind in object_types),
        *(f"{kind}Type # rtype" for kind in receptacle_types),
        *(f"{location} # location" for location in sorted({start, *where.values()})),
    ]
    goal = known.goals[task_type]["pddl"].format(obj=thing, recep=place, toggle=lamp)
    text = (
        f"(define (problem {spec.name.replace('-', '_')})\n(:domain alfred)\n"
        "(:objects\n" + "\n".join(named) + "\n)\n(:init\n" + "\n".join(facts) + "\n)\n"
    )
    for plain, mangled in _MANGLED:
        text, goal = text.replace(plain, mangled), goal.replace(plain, mangled)
    return (text + goal).replace("#", "-")


def fits_all(fits: dict[str, set[str]]) -> set[str]:
    """Every kind of object that fits anywhere; sliced ones are left out, as no game slices."""
    return {kind for kinds in fits.values() for kind in kinds if not kind.endswith("Sliced")}


def _location(pose: tuple[float, ...]) -> str:
    x, z, rotation, horizon = pose
    return f"loc|{round(x * 4)}|{round(z * 4)}|{round(rotation / 90)}|{round(horizon)}"


def _coordinate(rng: random.Random) -> str:
    return f"{rng.uniform(-4.0, 4.0):+06.2f}"
