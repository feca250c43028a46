"""The sample world: small sources in upstream's formats, with images on a local server."""

from pmd_pipeline.demo.world.server import serve
from pmd_pipeline.demo.world.world import World, load_world, write_world

__all__ = ["World", "load_world", "serve", "write_world"]
