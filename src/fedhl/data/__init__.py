"""From a data source to tokenised examples, each owned by one client."""
