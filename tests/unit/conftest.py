"""Hypothesis: the same examples in every run, and no time limits, which a loaded machine would break.

``pytest --hypothesis-profile search`` draws new examples, ten times as many: for hunting defects, not for a verdict on a change.
"""

from hypothesis import HealthCheck, settings

settings.register_profile("fixed", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("search", deadline=None, max_examples=1000, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("fixed")
