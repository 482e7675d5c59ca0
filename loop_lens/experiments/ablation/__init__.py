"""Injection, norm placement and block size in small looped models that are trained here."""
