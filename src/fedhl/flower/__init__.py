"""Federations over a network, by Flower (`pip install 'fedhl[flower]'`): the only package that imports
flwr."""
