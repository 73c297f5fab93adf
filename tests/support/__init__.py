"""What the tests share: tiny models and runs, cohorts, federations, the contract, dense references."""
