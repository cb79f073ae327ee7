"""Sweeps: named variations of one configuration, trained one after another and compared."""
