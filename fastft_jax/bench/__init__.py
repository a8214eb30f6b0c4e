"""`python -m fastft_jax.bench`: how fast training runs on this card, and where a step's time goes."""
