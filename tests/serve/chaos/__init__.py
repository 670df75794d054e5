"""Clients that come at random times, leave, and send what is wrong; against a server that must not mind."""
