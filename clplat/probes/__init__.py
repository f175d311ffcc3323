"""Why something was forgotten: pure functions of a learner, a stream and an experience."""
