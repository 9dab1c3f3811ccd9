"""Power sources and the sampler loop that polls them."""
