"""All settings, as one tree."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

from parallama.checking import Field
from parallama.config.accounting import RateLimiting, Usage
from parallama.config.authentication import Authentication, Granted, RoleName
from parallama.config.gateways import ApiGateways
from parallama.config.processes import Admin, Envoy, Logging, Model, Server, Shutdown
from parallama.config.stores import Database, Redis
from parallama.roles import BUILT_IN, Permissions, permissions
from parallama.sections import Section, section
from parallama.shapes import Role as ShapedRole
from parallama.shapes import Shape
from parallama.values import FilePath


class Config(Section):
    """Everything that can be set. Made by `load`."""

    server: Server = section()
    state_dir: FilePath = Field(
        default=Path("state"),
        description="Folder for sockets, counters and the files that Envoy is given.",
    )
    database: Database = section()
    redis: Redis = section()
    authentication: Authentication = section()
    roles: Annotated[
        dict[RoleName, tuple[Granted, ...]],
        Field(examples=[{"auditor": ["audit:read", "usage:read"]}]),
    ] = Field(
        default={},
        description="Roles beside the built-in ones, with what each grants as "
        "`resource:action[:scope]`.",
    )
    api_gateways: ApiGateways = section()
    request_shapes: Annotated[
        dict[ShapedRole, Shape],
        Field(examples=[{"user": {"num_ctx": {"max": 8192}, "keep_alive": {"max": "30m"}}}]),
    ] = Field(
        default={},
        description="What becomes of parameters that requests of a role send, such as `max_tokens` "
        "and `num_ctx`; `*` is for all roles: see [shapes](models.md#shapes).",
    )
    rate_limiting: RateLimiting = section()
    usage: Usage = section()
    envoy: Envoy = section()
    model: Model = section()
    admin: Admin = section()
    shutdown: Shutdown = section()
    logging: Logging = section()

    _source: Path | None = None

    @property
    def source(self) -> Path:
        """The file this came from."""
        return self._source or Path.cwd() / "config.yaml"

    @property
    def dir(self) -> Path:
        """The file's folder, where relative paths start."""
        return self.source.parent

    @property
    def known_roles(self) -> Mapping[str, Permissions]:
        """Those that are built in, and those set here."""
        return {**BUILT_IN, **{name: permissions(each) for name, each in self.roles.items()}}

    @property
    def run_dir(self) -> Path:
        return self.state_dir / "run"

    @property
    def signing_dir(self) -> Path:
        return self.authentication.signing_keys_dir or self.state_dir / "signing"
