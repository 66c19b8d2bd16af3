"""Give a module another class in place: the same object under the same name, and one more thing that it does.

A *role* is a mixin. ``add_role`` replaces the class of a module by a subclass of it that has the role too. Class types
instead of wrappers, because whoever walks names, writes attributes or asks for types finds the layer that runs, and
instead of forward hooks, because compilers do not guard on those.
"""

import copyreg
from collections.abc import Callable
from typing import Any, ClassVar, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_Roles: TypeAlias = "tuple[type[Role], ...]"

#: Id of a class and role -> the class that has the role too. By id, because classes with roles may equal plain ones.
_made: dict[tuple[int, type["Role"]], type["Role"]] = {}
#: Every class made here -> the class without any role, and the roles.
_recipes: dict[int, tuple[type[nn.Module], tuple[type["Role"], ...]]] = {}


class Role(nn.Module):
    """Mixed into the class of a module, to which it adds something."""

    #: The role of the highest rank comes first in the method resolution order.
    rank: ClassVar[int]
    #: Whether the class equals the plain one, so that tables by ``type(module)``, as counters, quantisers and fusers
    #: have, still find it. Not for roles that would be lost where such a table holds subclasses, as that of FSDP does.
    equals_plain: ClassVar[bool] = False

    @classmethod
    def class_attributes(cls, plain: type[nn.Module]) -> dict[str, Any]:
        """Return what else the class of a module needs."""
        return {}

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        if id(type(self)) not in _recipes or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced  # a class that others made of ours, or one that copies itself in its own way
        return _empty, _recipes[id(type(self))], *reduced[2:]


class _EqualType(type):
    """Makes a class equal the class that it was made of."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or (other is not None and other is cls.__dict__.get("_plain"))

    def __hash__(cls) -> int:
        plain = cls.__dict__.get("_plain")
        return super().__hash__() if plain is None else hash(plain)


def add_role(module: nn.Module, role: type[Role]) -> None:
    """Give a module a role, in place."""
    module.__class__ = _with_roles(
        type(module),
        lambda roles: (*(other for other in roles if other is not role), role),
        is_derived=is_parametrized(module),  # the role goes below, so that taking the parametrization away leaves it
    )


def remove_role(module: nn.Module, role: type[Role]) -> None:
    """Take a role away from a module, in place."""
    module.__class__ = _with_roles(
        type(module),
        lambda roles: tuple(other for other in roles if other is not role),
        is_derived=id(type(module)) not in _recipes,
    )


def _with_roles(kind: type, change: Callable[[_Roles], _Roles], *, is_derived: bool) -> type[nn.Module]:
    """Return a class with other roles; if others derived it, as parametrizations do, one derived in the same way."""
    if not is_derived:
        plain, roles = _recipe(kind)
        return _class_with(plain, change(roles))
    bases = [
        _with_roles(base, change, is_derived=issubclass(base, Role) and id(base) not in _recipes)
        if issubclass(base, Role) or len(kind.__bases__) == 1
        else base
        for base in kind.__bases__
    ]
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    derived: type[nn.Module] = type(kind)(kind.__name__, tuple(bases), names)
    return derived


def _recipe(of: type[nn.Module]) -> tuple[type[nn.Module], tuple[type[Role], ...]]:
    return _recipes.get(id(of), (of, ()))


def _class_with(plain: type[nn.Module], roles: tuple[type[Role], ...]) -> type[nn.Module]:
    made = plain
    for role in sorted(roles, key=lambda role: role.rank):
        made = _class_of(made, role)
    return made


def _class_of(plain: type[nn.Module], role: type[Role]) -> type[Role]:
    if (id(plain), role) not in _made:
        names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
        kind: Any = type(plain)
        if role.equals_plain and not issubclass(kind, _EqualType):
            kind = _EqualType if kind is type else type(kind.__name__, (_EqualType, kind), {})
        attributes = {**names, **role.class_attributes(plain), "_plain": plain if role.equals_plain else None}
        made = kind(plain.__name__, (role, plain), attributes)
        _made[id(plain), role] = made  # which keeps the plain class alive, and so its id
        root, roles = _recipe(plain)
        _recipes[id(made)] = root, (*roles, role)
    return _made[id(plain), role]


def _empty(plain: type[nn.Module], roles: tuple[type[Role], ...]) -> nn.Module:
    """Make an instance for ``copy`` and ``pickle`` to fill."""
    made = _class_with(plain, roles)
    return made.__new__(made)
