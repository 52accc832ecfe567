"""What a worker could not deliver before its end: written to files, and said."""

from __future__ import annotations

import logging
import os

from delve_ray.recovery import UNDELIVERED
from delve_ray.shipping import Shipper
from delve_ray.storage import Storage

log = logging.getLogger(__name__)


def keep_undelivered(shipper: Shipper, savefile: str) -> bool:
    """Write what the store does not safely have into the run's directory, or, where that cannot be, to a local one.

    Says what was not delivered, where it is, and which command merges it. Returns whether all of it is kept.
    """
    run, rank = shipper.source.run, shipper.source.rank
    outbox = shipper.outbox
    if unpacked := shipper.unpacked:
        log.error(
            "rank %d of run %s ends while rows of %s are still on their device; they are lost", rank, run, unpacked
        )
    if not len(outbox):
        return not unpacked
    what, problem = shipper.undelivered(), shipper.lost or "the store did not take it in time"
    storage = Storage(savefile)
    folders = [os.path.join(storage.local_path, UNDELIVERED)] if storage.is_local else []
    for folder in [*folders, f"{outbox.folder}-{UNDELIVERED}"]:
        try:
            outbox.write_all(folder)
        except OSError as error:
            problem += f"; {folder} cannot be written: {error}"
            continue
        log.error(
            "rank %d of run %s ends without having delivered %s (%s); it is kept in %s: once the run has ended, "
            "`delve-ray recover %s` merges it",
            rank,
            run,
            what,
            problem,
            folder,
            storage.uri if folder in folders else f"{storage.uri} {folder}",
        )
        return True
    log.error(
        "rank %d of run %s ends without having delivered %s (%s); what was on disk stays in %s",
        rank,
        run,
        what,
        problem,
        outbox.folder,
    )
    return False
