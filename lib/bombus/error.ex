defmodule Bombus.Error do
  @moduledoc """
  What went wrong at run time: a missing file, a bad checkpoint, a full queue.

  `:reason` is one of

    * `:not_found`, `:io` - a file is missing, or cannot be read; a link that leads nowhere is `:io`, and
      the message names the link and its target
    * `:already_there` - the folder where a model is to be saved, or an adapter is to be trained, has one:
      see the option `:overwrite`
    * `:disk_full` - there is no room for a file that is written
    * `:bad_config`, `:bad_checkpoint`, `:bad_tokenizer`, `:bad_adapter` - a file is not what it
      should be; the message names file, tensor or field
    * `:unsupported` - the file is fine, but Bombus cannot use it
    * `:quantization_mismatch` - the checkpoint is quantized already, and not as `:quantization` says
    * `:no_gpu` - `device: :gpu` where MLX finds none, or is not built in
    * `:bad_request`, `:prompt_too_long` - a text that somebody typed is empty, not UTF-8, refused by the
      chat template, or longer than the context
    * `:revision_not_found`, `:gated`, `:unauthorized`, `:rate_limited`, `:server_error`, `:no_network`,
      `:offline`, `:bad_download`, `:busy` - the Hub did not give a file: see `Bombus.Hub`
    * `:overloaded` - the queue is full
    * `:python_missing`, `:mlx_lm_missing`, `:bad_training_data`, `:too_few_rows`, `:no_valid_content`,
      `:already_done`, `:loss_is_nan`, `:training_failed`, `:training_killed`, `:cancelled` - a training
      did not end well: see `Bombus.Training.LoRA.train/1`
    * `:timeout` - the request did not end within its `:timeout`
    * `:unloaded` - the model, tokenizer or adapter was freed by `Bombus.unload/2`
    * `:not_running`, `:no_connection` - there is no serving of that name, or no connection to its node
    * `:loading` - the serving still loads its model
    * `:stopped` - the model's engine or the serving has stopped
    * `:out_of_memory` - there is none for the prompt's keys and values, or for a step
    * `:backend`, `:panic` - a step failed, and with it all sequences in it; the engine serves on

  A message quotes at most 400 characters of a piece of text from outside, and has at most 3,000 in all.

  What the caller's code got wrong raises `ArgumentError` instead.
  """

  @typedoc "What kind of fault it is: see above."
  @type reason ::
          :already_done
          | :already_there
          | :backend
          | :bad_adapter
          | :bad_checkpoint
          | :bad_config
          | :bad_download
          | :bad_request
          | :bad_tokenizer
          | :bad_training_data
          | :busy
          | :cancelled
          | :disk_full
          | :gated
          | :io
          | :loading
          | :loss_is_nan
          | :mlx_lm_missing
          | :no_connection
          | :no_gpu
          | :no_network
          | :no_valid_content
          | :not_found
          | :not_running
          | :offline
          | :out_of_memory
          | :overloaded
          | :panic
          | :prompt_too_long
          | :python_missing
          | :quantization_mismatch
          | :rate_limited
          | :revision_not_found
          | :server_error
          | :stopped
          | :timeout
          | :too_few_rows
          | :training_failed
          | :training_killed
          | :unauthorized
          | :unloaded
          | :unsupported

  @typedoc "An error at run time, returned in `{:error, error}` or raised."
  @type t :: %__MODULE__{reason: reason(), message: String.t()}

  defexception [:reason, :message]

  @doc false
  def from_native({:error, {reason, message}}), do: error(reason, message)
  def from_native(answer), do: answer

  @doc false
  def error(reason, message), do: {:error, %__MODULE__{reason: reason, message: message}}

  @doc false
  def unwrap!({:ok, value}), do: value
  def unwrap!({:error, %__MODULE__{} = error}), do: raise(error)
end
