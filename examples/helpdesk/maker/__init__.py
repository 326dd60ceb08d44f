"""Makes the bundled help-desk task: one module per part, `company` holds what all of them share."""
