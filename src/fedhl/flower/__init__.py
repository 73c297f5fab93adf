"""Federations over a network, by Flower (`pip install 'fedhl[flower]'`): the only part that imports flwr."""
