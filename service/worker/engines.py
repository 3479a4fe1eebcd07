"""Which engine the settings ask for."""

from service.config import Settings
from service.worker.engine import Engine


def make(settings: Settings) -> Engine:
    """The engine, not started. vLLM is imported only when it is the one."""
    if settings.engine == "simulated":
        from service.worker.simulated_engine import SimulatedEngine

        return SimulatedEngine(
            settings.model or "tiny",
            settings.simulated_request_s,
            settings.simulated_load_s,
            settings.simulated_window,
            settings.window,
        )
    from service.worker.vllm_engine import VllmEngine

    return VllmEngine(settings)
