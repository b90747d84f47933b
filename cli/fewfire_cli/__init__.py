"""The `fewfire` command: arguments in, text out; what it does is the business of the `fewfire` package."""
