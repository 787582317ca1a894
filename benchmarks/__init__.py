"""Measurements that anyone can run; each prints its conditions."""
