"""The kernel that executes a notebook, ended without noise. Importing this needs Jupyter, an extra of the suite."""

from __future__ import annotations

from jupyter_client.manager import AsyncKernelManager


class QuietKernelManager(AsyncKernelManager):
    """Asks the kernel to end, without the interrupt that Jupyter sends before.

    When a notebook is over no cell runs that an interrupt could stop; it would only hit the kernel between two
    messages, which it then reports as an error.
    """

    async def shutdown_kernel(self, now: bool = False, restart: bool = False) -> None:  # type: ignore[override]
        """End the kernel: by request, and by force where it does not answer."""
        if not now:
            await self.request_shutdown(restart=restart)
        await self.finish_shutdown(waittime=0 if now else None, restart=restart)
        await self.cleanup_resources(restart=restart)
