"""Attacks on the guard that the page may ask for: what they may cost, how one is run, and its route."""

from nndefense.serving.demo_attacks.attack import AttackJob, AttackTarget, AttackWatch, attack_picture
from nndefense.serving.demo_attacks.routes import offer, router

__all__ = ["AttackJob", "AttackTarget", "AttackWatch", "attack_picture", "offer", "router"]
