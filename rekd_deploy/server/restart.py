"""When a server that died is started again: with growing pauses, and not for ever. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from rekd_train.errors import ConfigError


@dataclass(frozen=True)
class RestartPolicy:
    """How often, and after which pauses."""

    limit: int = 5
    """Starts in a row; 0: none, a death ends the service."""
    first_pause: float = 1.0
    """Seconds before the first of them; each further pause is twice as long."""
    longest_pause: float = 30.0
    healthy_seconds: float = 60.0
    """A server that has run this long has recovered: the counting begins anew."""

    def __post_init__(self) -> None:
        if self.limit < 0:
            raise ConfigError(f"the limit of restarts is {self.limit}; it must be at least 0")

    def pause(self, deaths: int) -> float | None:
        """Seconds to wait before the next start; None: no more.

        Args:
            deaths: in a row, this one included.
        """
        if deaths > self.limit:
            return None
        return min(self.first_pause * 2.0 ** (deaths - 1), self.longest_pause)


NEVER = RestartPolicy(limit=0)
