"""How this node's containerd is configured, as far as a rewrite of requests depends on it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# The shims that run containers with runc or a runtime of its interface, such as crun.
_RUNC_SHIMS = frozenset({"io.containerd.runc.v2", "io.containerd.runc.v1", "io.containerd.runtime.v1.linux"})


@dataclass(frozen=True)
class Runtime:
    """A runtime handler: its shim's type, and whether its containers start from a base specification of the operator's
    (containerd's `base_runtime_spec`), which may bring a seccomp profile that no request shows."""

    type: str
    has_base_spec: bool

    @property
    def is_runc(self) -> bool:
        return self.type in _RUNC_SHIMS


@dataclass(frozen=True)
class Configuration:
    """`unset_seccomp_profile` is what containers get that ask for no profile; empty means none."""

    unset_seccomp_profile: str
    default_runtime: str
    runtimes: Mapping[str, Runtime]

    @classmethod
    def from_info(cls, info: Mapping[str, str]) -> Configuration | None:
        """From the `info` of CRI's Status(verbose), whose "config" is containerd's CRI configuration as JSON, with the
        same names from 1.6 to 2.x (`pkg/cri/config`, later `internal/cri/config`). None if it isn't there."""
        try:
            config = json.loads(info.get("config", ""))
            containerd = config["containerd"]
            runtimes = {name: _runtime(value) for name, value in containerd["runtimes"].items()}
            return cls(str(config.get("unsetSeccompProfile") or ""), str(containerd["defaultRuntimeName"]), runtimes)
        except (ValueError, KeyError, TypeError, AttributeError):
            return None

    def runtime(self, handler: str) -> Runtime | None:
        """The runtime behind a handler's name; the empty one is the default."""
        return self.runtimes.get(handler or self.default_runtime)


def _runtime(value: Mapping[str, Any]) -> Runtime:
    return Runtime(str(value.get("runtimeType", "")), bool(value.get("baseRuntimeSpec")))
