"""The whole product on a sample world, built, learned and drawn."""
