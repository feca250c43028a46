"""The sample world: nine tiny sources in upstream's form, drawn and served on loopback."""

from pmd_pipeline.demo.world.server import serve
from pmd_pipeline.demo.world.world import World, load_world, write_world

__all__ = ["World", "load_world", "serve", "write_world"]
