"""`moepp ablate`: a matrix of variants → runs → two tidy frames → report, CSVs, plots and a table."""
