"""Which tiers a request may go to, and in which order. This depends on the request only, not on the load.

A :class:`TierTable` is built once from the configuration. :func:`resolve` turns a
:class:`RouteRequest` into a :class:`Route`; :mod:`controlplane.core.routing.router` then chooses an
endpoint. A tier's position in the table is its rank: 0 is the cheapest.

Per-request values are named tuples: as immutable as frozen dataclasses, but created in a third of the time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Final, NamedTuple

from controlplane.core.domain.endpoint import Capabilities
from controlplane.core.domain.request import Complexity, Priority
from controlplane.errors import shown

AUTO: Final = "auto"
"""The model name that lets tierplane choose."""
MAX_SHOWN: Final = 5
"""How many of the unknown models of a request its error names."""

RESERVED: Final = {
    AUTO: "it means that tierplane chooses",
    "gateway": "it is the gateway's own name, in Serve and in `tierplane logs`",
    "controller": "it is the controller's own name in `tierplane logs`",
}
"""Names that no tier or model can have → the reason."""

DEFAULT_COMPLEXITIES: Final = {
    "lightweight": Complexity.SIMPLE,
    "balanced": Complexity.MODERATE,
    "capable": Complexity.COMPLEX,
}
"""Tier name → the complexity it serves, unless its own or another tier's policy says otherwise."""

DEFAULT_AGENT_TIERS: Final = {
    "customer_service": "customer_service",
    "technical": "technical_support",
    "general": "general_purpose",
}
"""Agent type → tier, if that tier exists and no tier claims the agent type."""


def name_problem(name: str, owner: str = "tier") -> str:
    """Why no tier or model (``owner``) can have this name; "" if one can."""
    return f"'{name}' can't be a {owner}'s name: {RESERVED[name]}" if name in RESERVED else ""


class OverflowDirection(StrEnum):
    """Where requests for a tier may go when it can't serve them."""

    UP = "up"
    """To more capable tiers."""
    DOWN = "down"
    """To cheaper tiers."""
    BOTH = "both"
    NONE = "none"
    """Nowhere: the requests wait."""


class Api(StrEnum):
    """The API of an engine that a request uses."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    EMBEDDINGS = "embeddings"
    RESPONSES = "responses"
    MESSAGES = "messages"


class Input(StrEnum):
    """What a request may contain besides text."""

    IMAGES = "images"
    AUDIO = "audio"
    VIDEO = "video"
    TOOLS = "tools"


API_BITS: Final[dict[Api, int]] = {api: 1 << index for index, api in enumerate(Api)}
INPUT_BITS: Final[dict[Input, int]] = {each: 1 << index for index, each in enumerate(Input, len(API_BITS))}
ALL_INPUTS: Final = sum(INPUT_BITS.values())
_PLAIN_BITS: Final = API_BITS[Api.CHAT] | API_BITS[Api.COMPLETIONS]


def api_bits(capabilities: Capabilities) -> int:
    """The APIs that an engine serves and the inputs that it takes, as bits of :data:`API_BITS` and
    :data:`INPUT_BITS`."""
    bits = _PLAIN_BITS
    for each, bit in INPUT_BITS.items():
        if getattr(capabilities, each):
            bits |= bit
    if capabilities.embeddings:
        bits |= API_BITS[Api.EMBEDDINGS]
    if capabilities.responses:
        bits |= API_BITS[Api.RESPONSES]
    if capabilities.messages:
        bits |= API_BITS[Api.MESSAGES]
    return bits


@dataclass(frozen=True, slots=True)
class TierPolicy:
    """What routing needs to know about one tier."""

    name: str
    model_id: str
    """The name by which clients ask for the model."""
    model_name: str = ""
    """The model's whole name (``organisation/name``), which clients may use too; "" if it has none."""
    identity: str = ""
    """Equal for tiers that serve the same model; by default ``model_id``."""
    label: str = ""
    """The model's name in messages; by default ``model_id``."""
    complexities: tuple[Complexity, ...] | None = None
    """The complexities it serves; None means those for its name, see :data:`DEFAULT_COMPLEXITIES`."""
    agent_types: tuple[str, ...] = ()
    spill: OverflowDirection = OverflowDirection.UP
    """Where requests go when the tier is full. Up by default: under load, a response may cost more, but its
    quality never drops unnoticed."""
    bridge: OverflowDirection | None = None
    """Where requests go while the tier is down: none of its endpoints can take any. None means up and down,
    or nowhere if ``spill`` is none. Overload passes in seconds, so waiting helps; a restart takes minutes,
    and then a response from another tier is better than none."""
    floor: str | None = None
    """Requests for this tier never go to a tier below the one named here."""


class TierAccess(NamedTuple):
    """What the principal of a request may use; None: all."""

    tiers: frozenset[str] | None
    models: frozenset[str] | None


class RouteRequest(NamedTuple):
    """What routing needs to know about a request."""

    model: str = AUTO
    """``auto``, a tier, or a model id."""
    models: tuple[str, ...] = ()
    """Acceptable models in order of preference; if given, ``model`` is ignored."""
    complexity: Complexity | None = None
    agent_type: str | None = None
    min_tier: str | None = None
    """The quality floor: no tier below this one."""
    priority: Priority = Priority.NORMAL
    api: Api = Api.CHAT
    session_key: int | None = None
    """A hash of the session, so that its turns find their KV cache again."""
    prefix_key: int | None = None
    """A hash of the prompt's beginning; used when there is no session."""
    inputs: int = 0
    """What it contains besides text, as bits of :data:`INPUT_BITS`."""
    exclude: frozenset[str] = frozenset()
    """``EndpointLoad.key`` of the endpoints that were tried for this request."""
    access: TierAccess | None = None
    """What its principal may use; None: all."""


class RouteRefusal(StrEnum):
    """Why a request can't be served and waiting would not help."""

    UNKNOWN_MODEL = "unknown_model"
    UNKNOWN_TIER = "unknown_tier"
    """``min_tier`` names no tier."""
    NOT_ALLOWED = "not_allowed"
    """The request's principal may use none of the tiers."""
    BELOW_FLOOR = "below_floor"
    """Every model that the request names is below the quality floor."""
    NO_CAPABILITY = "no_capability"
    """No engine of the requested tiers serves this API, or takes the request's images, audio, video or
    tools."""
    EXHAUSTED = "exhausted"
    """Every endpoint that could serve it was tried already."""
    FAILED = "failed"
    """The supervisors of all endpoints that could serve it gave up."""


class Route(NamedTuple):
    """Where a request may go. Tiers are given by rank."""

    order: tuple[int, ...]
    """Requested tiers, in order of preference."""
    reasons: tuple[str, ...]
    """Why each tier of ``order`` is in it; plain ASCII, for a header."""
    spill: tuple[int, ...] = ()
    """Tiers that may serve it when those of ``order`` are full."""
    bridge: tuple[int, ...] = ()
    """Tiers that may serve it when those of ``order`` are down, nearest first."""
    auto: bool = False
    """Whether tierplane chose the tier, not the client."""
    floor: int = 0
    refusal: RouteRefusal | None = None
    message: str = ""
    """For the client, if refused."""
    allowed: frozenset[int] | None = None
    """The tiers that the request's principal may use; None: all."""


@dataclass(frozen=True, slots=True)
class TierTable:
    """The tiers, and everything about their routes that can be computed before a request arrives. Create it
    with :meth:`build`."""

    policies: tuple[TierPolicy, ...]
    default: int
    rank_of: dict[str, int]
    tiers_of_model: dict[str, tuple[int, ...]]
    """Name of a model → the tiers that serve it."""
    ambiguous: dict[str, tuple[int, ...]]
    """Name that different models have → the tiers that serve one of them."""
    same_model: tuple[tuple[int, ...], ...]
    """``same_model[rank]``: the tiers that serve the same model as that tier, itself included."""
    tier_of_complexity: dict[Complexity, int]
    tier_of_agent: dict[str, int]
    neighbours: tuple[tuple[tuple[tuple[int, ...], tuple[int, ...]], ...], ...]
    """``neighbours[rank][floor]`` → (spill, bridge)."""
    own_floor: tuple[int, ...]

    @classmethod
    def build(cls, policies: Sequence[TierPolicy], default_tier: str | None = None) -> TierTable:
        """The table of ``policies``, from the cheapest to the most capable.

        ``default_tier`` is where ``auto`` goes without a hint; by default ``balanced``, or else the
        first. Raises ValueError if a name is used twice or a named tier is missing.
        """
        if not policies:
            raise ValueError("there must be at least one tier")
        rank_of = {policy.name: rank for rank, policy in enumerate(policies)}
        if len(rank_of) != len(policies):
            raise ValueError("two tiers have the same name")
        for policy in policies:
            if problem := name_problem(policy.name):
                raise ValueError(problem)
        for policy in policies:
            if policy.floor is not None and policy.floor not in rank_of:
                raise ValueError(f"tier '{policy.name}': floor '{policy.floor}' is not a tier")
        if default_tier is not None and default_tier not in rank_of:
            raise ValueError(f"default tier '{default_tier}' is not a tier")
        default = rank_of[default_tier] if default_tier is not None else rank_of.get("balanced", 0)

        identities = [policy.identity or policy.model_id for policy in policies]
        named: dict[str, tuple[int, ...]] = {}
        for rank, policy in enumerate(policies):
            for name in dict.fromkeys((policy.model_id, policy.model_name)):
                if name:
                    named[name] = (*named.get(name, ()), rank)
        ambiguous = {
            name: ranks for name, ranks in named.items() if len({identities[rank] for rank in ranks}) > 1
        }

        own_floor = tuple(rank_of[policy.floor] if policy.floor is not None else 0 for policy in policies)
        return cls(
            policies=tuple(policies),
            default=default,
            rank_of=rank_of,
            tiers_of_model={name: ranks for name, ranks in named.items() if name not in ambiguous},
            ambiguous=ambiguous,
            same_model=tuple(
                tuple(rank for rank, other in enumerate(identities) if other == identity)
                for identity in identities
            ),
            tier_of_complexity=_complexity_map(policies, rank_of),
            tier_of_agent=_agent_map(policies, rank_of),
            neighbours=tuple(
                tuple(
                    _neighbours(policies, rank, max(floor, own_floor[rank])) for floor in range(len(policies))
                )
                for rank in range(len(policies))
            ),
            own_floor=own_floor,
        )

    def listed_models(self) -> dict[str, tuple[int, ...]]:
        """One name of each model → its tiers: the model id, or the whole name if different models have the
        id. A model that has no name of its own is missing: it is asked for by its tier."""
        found: dict[str, tuple[int, ...]] = {}
        for policy in self.policies:
            for name in (policy.model_id, policy.model_name):
                if name in self.tiers_of_model:
                    found[name] = self.tiers_of_model[name]
                    break
        return found


def resolve(request: RouteRequest, table: TierTable) -> Route:
    """Where a request may go.

    The first of these that the request has decides: the list ``models``, a tier or model id in ``model``,
    ``complexity``, ``agent_type``; else the default tier. A request for a tier may spill according to the
    tier's policy; a request for a model id or a list of models goes nowhere else. Tiers that its principal
    may not use are left out.
    """
    route = _resolve(request, table)
    return route if request.access is None else _restricted(route, request.access, table)


def _resolve(request: RouteRequest, table: TierTable) -> Route:
    floor = 0
    if request.min_tier is not None:
        rank = table.rank_of.get(request.min_tier)
        if rank is None:
            known = ", ".join(policy.name for policy in table.policies)
            return _refused(
                RouteRefusal.UNKNOWN_TIER,
                f"no tier '{shown(request.min_tier)}' for x-min-tier: there is {known}",
            )
        floor = rank
    if request.models:
        return _from_list(request.models, floor, table)
    model = request.model
    auto = model == AUTO
    if auto:
        tier, reason = _hinted(request, table)
    elif model in table.rank_of:
        tier, reason = table.rank_of[model], "model=" + model
    else:
        return _pinned(model, floor, table)
    if tier < floor:
        tier = floor
        reason = f"{reason}, min_tier={table.policies[floor].name}"
    spill, bridge = table.neighbours[tier][floor]
    return Route((tier,), (reason,), spill, bridge, auto, floor)


def resume_route(table: TierTable, rank: int, access: TierAccess | None = None) -> Route:
    """The route of a stream that must be resumed by the model that began it: the tiers that serve the model
    of tier ``rank``, that tier first, and no others."""
    order = (rank, *(other for other in table.same_model[rank] if other != rank))
    route = Route(order, ("resume",) * len(order))
    return route if access is None else _restricted(route, access, table)


def _allowed_ranks(access: TierAccess, table: TierTable) -> frozenset[int]:
    """The ranks of the tiers that may be used."""
    tiers, models = access
    return frozenset(
        rank
        for rank, policy in enumerate(table.policies)
        if (tiers is None or policy.name in tiers)
        and (models is None or not models.isdisjoint((policy.name, policy.model_id, policy.model_name)))
    )


def _restricted(route: Route, access: TierAccess, table: TierTable) -> Route:
    """``route`` without the tiers that may not be used. A request for ``auto`` goes to the nearest tier that
    may be, the more capable first; any other request is refused if nothing is left."""
    if route.refusal is not None:
        return route
    allowed = _allowed_ranks(access, table)
    order = tuple(rank for rank in route.order if rank in allowed)
    if order:
        reasons = dict(zip(route.order, route.reasons, strict=True))
        return route._replace(
            order=order,
            reasons=tuple(reasons[rank] for rank in order),
            spill=tuple(rank for rank in route.spill if rank in allowed),
            bridge=tuple(rank for rank in route.bridge if rank in allowed),
            allowed=allowed,
        )
    names = [table.policies[rank].name for rank in sorted(allowed)]
    if route.auto:
        wanted = route.order[0]
        usable = [rank for rank in allowed if rank >= route.floor]
        if usable:
            rank = min(usable, key=lambda rank: (rank < wanted, abs(rank - wanted)))
            spill, bridge = table.neighbours[rank][route.floor]
            nearest = route._replace(
                order=(rank,),
                reasons=(f"{route.reasons[0]}, allowed by the key",),
                spill=spill,
                bridge=bridge,
            )
            return _restricted(nearest, access, table)
    there = f"it may use {', '.join(names)}" if names else "none of its tiers or models is here"
    asked = ", ".join(table.policies[rank].name for rank in route.order)
    return Route((), (), refusal=RouteRefusal.NOT_ALLOWED, message=f"this key may not use {asked}: {there}")


def _hinted(request: RouteRequest, table: TierTable) -> tuple[int, str]:
    if request.complexity is not None:
        tier = table.tier_of_complexity.get(request.complexity)
        if tier is not None:
            return tier, "complexity=" + request.complexity
    if request.agent_type is not None:
        tier = table.tier_of_agent.get(request.agent_type)
        if tier is not None:
            return tier, "agent_type=" + request.agent_type
    return table.default, "default"


def _pinned(model: str, floor: int, table: TierTable) -> Route:
    tiers = table.tiers_of_model.get(model)
    if tiers is None:
        return _unknown([model], table)
    allowed = tuple(rank for rank in tiers if rank >= floor)
    if not allowed:
        return _refused(
            RouteRefusal.BELOW_FLOOR,
            f"model '{model}' is below the tier '{table.policies[floor].name}' that x-min-tier asks for",
        )
    return Route(allowed, ("model=" + model,) * len(allowed), floor=floor)


def _from_list(models: tuple[str, ...], floor: int, table: TierTable) -> Route:
    order: list[int] = []
    reasons: list[str] = []
    known = False
    for position, model in enumerate(models):
        if model == AUTO:
            tiers: tuple[int, ...] = (table.default,)
        elif model in table.rank_of:
            tiers = (table.rank_of[model],)
        elif model in table.ambiguous:
            return _unknown([model], table)
        else:
            tiers = table.tiers_of_model.get(model, ())
        known = known or bool(tiers)
        for tier in tiers:
            if tier >= floor and tier not in order:
                order.append(tier)
                reasons.append(f"models[{position}]={model}")
    if not known:
        return _unknown(models, table)
    if not order:
        return _refused(
            RouteRefusal.BELOW_FLOOR,
            f"every model asked for is below '{table.policies[floor].name}', which x-min-tier asks for",
        )
    return Route(tuple(order), tuple(reasons), floor=floor)


def no_such_model(models: Sequence[str], table: TierTable) -> str:
    """Why none of these names means one model: nothing has the name, or different models have it."""
    for model in models:
        if model in table.ambiguous:
            named = ambiguity(model, table)
            return f"'{model}' is the name of different models: {named}; ask for one of these tiers"
    names = [AUTO, *(policy.name for policy in table.policies), *table.listed_models()]
    wanted = ", ".join(f"'{shown(model)}'" for model in models[:MAX_SHOWN])
    if len(models) > MAX_SHOWN:
        wanted += f" and {len(models) - MAX_SHOWN} others"
    return f"no model {wanted}: there is {', '.join(dict.fromkeys(names))}"


def _unknown(models: Sequence[str], table: TierTable) -> Route:
    return _refused(RouteRefusal.UNKNOWN_MODEL, no_such_model(models, table))


def ambiguity(name: str, table: TierTable) -> str:
    """The different models that ``name`` may mean, with their tiers: ``orga/Llama (tier a), …``."""
    tiers_of: dict[str, list[str]] = {}
    for rank in table.ambiguous[name]:
        policy = table.policies[rank]
        tiers_of.setdefault(policy.identity or policy.model_id, []).append(policy.name)
    labels = {
        policy.identity or policy.model_id: policy.label or policy.model_id for policy in table.policies
    }
    return ", ".join(f"{labels[each]} (tier {', '.join(tiers)})" for each, tiers in tiers_of.items())


def _refused(refusal: RouteRefusal, message: str) -> Route:
    return Route((), (), refusal=refusal, message=message)


def _neighbours(
    policies: Sequence[TierPolicy], rank: int, floor: int
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    policy = policies[rank]
    bridge = policy.bridge
    if bridge is None:
        bridge = OverflowDirection.NONE if policy.spill is OverflowDirection.NONE else OverflowDirection.BOTH
    # Nearest first; of two equally near ones, the more capable.
    others = sorted(
        (other for other in range(len(policies)) if other != rank and other >= floor),
        key=lambda other: (abs(other - rank), -other),
    )
    return (
        tuple(other for other in others if _leads(policy.spill, rank, other)),
        tuple(other for other in others if _leads(bridge, rank, other)),
    )


def _leads(direction: OverflowDirection, rank: int, other: int) -> bool:
    if direction is OverflowDirection.BOTH:
        return True
    return direction is (OverflowDirection.UP if other > rank else OverflowDirection.DOWN)


def _complexity_map(policies: Sequence[TierPolicy], rank_of: dict[str, int]) -> dict[Complexity, int]:
    """The tier of every complexity. A complexity that no tier claims goes to the cheapest tier that claims a
    higher one, or else to the most capable tier that claims a lower one: better too capable than too weak. If
    no tier claims any, the tiers without agent types share them by rank."""
    claimed: dict[Complexity, int] = {}
    for rank, policy in enumerate(policies):
        for complexity in policy.complexities or ():
            claimed.setdefault(complexity, rank)
    for name, complexity in DEFAULT_COMPLEXITIES.items():
        rank_by_name = rank_of.get(name)
        if rank_by_name is not None and policies[rank_by_name].complexities is None:
            claimed.setdefault(complexity, rank_by_name)
    levels = list(Complexity)
    if not claimed:
        general = [rank for rank, policy in enumerate(policies) if not _is_special(policy)]
        if not general:
            return {}
        return {levels[0]: general[0], levels[1]: general[len(general) // 2], levels[2]: general[-1]}
    result: dict[Complexity, int] = {}
    for index, level in enumerate(levels):
        more = [claimed[other] for other in levels[index:] if other in claimed]
        less = [claimed[other] for other in levels[:index] if other in claimed]
        result[level] = claimed[level] if level in claimed else min(more) if more else max(less)
    return result


def _is_special(policy: TierPolicy) -> bool:
    return bool(policy.agent_types) or policy.name in DEFAULT_AGENT_TIERS.values()


def _agent_map(policies: Sequence[TierPolicy], rank_of: dict[str, int]) -> dict[str, int]:
    claimed: dict[str, int] = {}
    for rank, policy in enumerate(policies):
        for agent_type in policy.agent_types:
            claimed.setdefault(agent_type, rank)
    for agent_type, tier in DEFAULT_AGENT_TIERS.items():
        if tier in rank_of:
            claimed.setdefault(agent_type, rank_of[tier])
    return claimed
