"""Makes the engine that the settings ask for."""

from service.config import Settings
from service.worker.engine.protocol import Engine


def make(settings: Settings) -> Engine:
    """Returns the engine, not started. Imports vLLM only if it is the one."""
    if settings.engine == "simulated":
        from service.worker.engine.simulated import SimulatedEngine

        return SimulatedEngine(
            settings.model or "tiny",
            settings.simulated_request_s,
            settings.simulated_load_s,
            settings.simulated_window,
            settings.window,
            settings.simulated_load_failure,
            settings.simulated_adapters,
        )
    from service.worker.engine.vllm import VllmEngine

    return VllmEngine(settings)
