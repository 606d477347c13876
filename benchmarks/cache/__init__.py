"""What the feature store costs, beside plain files and beside other formats; see README.md."""
