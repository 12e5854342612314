"""soflowctl promote: changes the champion of a registered model."""

from __future__ import annotations

from soflow_platform.storage.project import find_project


def promote_command(
    model: str, force: str | None, rollback: bool, storage_option: str | None, tracking: str | None
) -> None:
    """Change the champion and say why."""
    from soflow_platform.cli.terminal import storage_flag
    from soflow_platform.jobs.targets import require_registry
    from soflow_platform.registry import promotion
    from soflow_platform.tracking.store import TrackingStore

    storage = find_project(storage_option)
    store = TrackingStore(tracking or storage.tracking_uri)
    require_registry(storage, store)
    done = promotion.rollback(store, model) if rollback else promotion.promote(store, model, force)
    before = f" (before: version {done.previous})" if done.previous else ""
    print(f"models:/{done.model}@champion is version {done.version}{before}: {done.reason}")
    print(
        f"next: soflowctl generate --model models:/{done.model}@champion --num 100 --out images{storage_flag(storage)}"
    )
