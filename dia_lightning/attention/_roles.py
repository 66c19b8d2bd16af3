"""Change the class of a module in place: the same object under the same name, with added behaviour.

A *role* is a mixin. ``add_role`` replaces the class of a module with a subclass that also has the role. We use classes
rather than wrappers, so that code that walks names, sets attributes or checks types finds the layer that runs, and
rather than forward hooks, because compilers do not guard on those.
"""

import copyreg
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeAlias

from torch import nn
from torch.nn.utils.parametrize import is_parametrized

_Roles: TypeAlias = "tuple[type[Role], ...]"

#: Id of a plain class and roles -> the class that has them. By id, because classes with roles may equal plain ones.
_made: dict[tuple[int, _Roles], type[nn.Module]] = {}


class Role(nn.Module):
    """A mixin that adds behaviour to the class of a module."""

    #: The role of the highest rank comes first in the method resolution order.
    rank: ClassVar[int]
    #: Whether the class equals the plain one, so that tables keyed by ``type(module)``, as in counters, quantizers and
    #: fusers, still find it. Not for roles that would be lost where such a table maps to subclasses, as in FSDP.
    equals_plain: ClassVar[bool] = False
    #: Further attributes of the class, by a base of the plain class.
    attributes: ClassVar[Mapping[type[nn.Module], Mapping[str, Any]]] = {}
    #: Methods of the plain class, where it has them, and their decorators.
    decorated: ClassVar[Mapping[str, Callable[[Any], Any]]] = {}

    def __init_subclass__(cls, **options: Any) -> None:
        """Keep a generated class away from hooks of the plain class for subclasses, such as registration."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        reduced: Any = super().__reduce_ex__(max(2, protocol))
        if "dia_recipe" not in vars(type(self)) or reduced[0] is not copyreg.__newobj__:  # type: ignore[attr-defined]
            return reduced  # a class derived from ours by others, or one with its own way of copying
        return _empty, _recipe(type(self)), *reduced[2:]


class _EqualType(type):
    """Makes a class equal to the class it was generated from."""

    def __eq__(cls, other: object) -> bool:
        return other is cls or (other is not None and other is vars(cls).get("dia_equals"))

    def __hash__(cls) -> int:
        plain = vars(cls).get("dia_equals")
        return super().__hash__() if plain is None else hash(plain)


def add_role(module: nn.Module, role: type[Role]) -> None:
    """Give a module a role, in place."""
    # below a parametrization, so that it stays when that is removed
    made = _changed(type(module), lambda roles: {*roles, role}, is_derived=is_parametrized(module))
    object.__setattr__(module, "__class__", made)  # past what a module does with attributes


def remove_role(module: nn.Module, role: type[Role]) -> None:
    """Remove a role from a module, in place."""
    is_derived = "dia_recipe" not in vars(type(module))
    made = _changed(type(module), lambda roles: {*roles} - {role}, is_derived=is_derived)
    object.__setattr__(module, "__class__", made)


def _changed(kind: type, change: Callable[[_Roles], set[type[Role]]], *, is_derived: bool) -> type[nn.Module]:
    """Return a class with other roles; if others derived it, as parametrizations do, derive it the same way again."""
    if not is_derived:
        plain, roles = _recipe(kind)
        return _class_with(plain, tuple(change(roles)))
    bases = [
        _changed(base, change, is_derived=issubclass(base, Role) and "dia_recipe" not in vars(base))
        if issubclass(base, Role) or len(kind.__bases__) == 1
        else base
        for base in kind.__bases__
    ]
    names = {name: value for name, value in vars(kind).items() if name not in ("__dict__", "__weakref__")}
    derived: type[nn.Module] = type(kind)(kind.__name__, tuple(bases), names)
    return derived


def plain_class(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module has without attention; of any other module, its class.

    A block or a site with attention is of a subclass, made for it. For tables by ``type(module)`` that hold no
    subclasses, and to build another module of the same kind.

    Args:
        module: any module.

    Example:
        >>> from dia_lightning.attention import attach
        >>> from dia_lightning.models import get_model
        >>> network = attach(get_model("cifar_resnet", depth=11), "dia-lstm")
        >>> plain_class(network.layer1[0].bn3)
        <class 'torch.nn.modules.batchnorm.BatchNorm2d'>
    """
    return _recipe(type(module))[0]


def _recipe(kind: type) -> tuple[type[nn.Module], _Roles]:
    """Return the class without any role, and the roles."""
    recipe: tuple[type[nn.Module], _Roles] = vars(kind).get("dia_recipe", (kind, ()))
    return recipe


def _class_with(plain: type[nn.Module], roles: _Roles) -> type[nn.Module]:
    roles = tuple(sorted(roles, key=lambda role: role.rank, reverse=True))
    if roles and (id(plain), roles) not in _made:
        kind: Any = type(plain)
        equals = plain if all(role.equals_plain for role in roles) else None
        if equals is not None:
            kind = _EqualType if kind is type else type(kind.__name__, (_EqualType, kind), {})
        names = {name: getattr(plain, name) for name in ("__module__", "__qualname__", "__doc__")}
        names.update(dia_recipe=(plain, roles), dia_equals=equals)
        for role in roles:
            for base, attributes in role.attributes.items():
                if issubclass(plain, base):
                    names.update(attributes)
            decorated = role.decorated.items()
            names.update({name: wrap(getattr(plain, name)) for name, wrap in decorated if hasattr(plain, name)})
        _made[id(plain), roles] = kind(plain.__name__, (*roles, plain), names)
    return _made[id(plain), roles] if roles else plain


def _empty(plain: type[nn.Module], roles: _Roles) -> nn.Module:
    """Make an instance for ``copy`` and ``pickle`` to fill."""
    made = _class_with(plain, roles)
    return made.__new__(made)
